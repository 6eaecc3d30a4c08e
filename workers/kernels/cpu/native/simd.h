// One vector of floats, in AVX-512 or AVX2: the compiler's flags decide. All kernels are written on it once.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace mull {

#if defined(__AVX512F__)

struct Floats {
    static constexpr int width = 16;
    __m512 v;

    static Floats zero() { return {_mm512_setzero_ps()}; }
    static Floats broadcast(float value) { return {_mm512_set1_ps(value)}; }
    static Floats load(const float* from) { return {_mm512_loadu_ps(from)}; }
    static Floats load(const float* from, int count) { return {_mm512_maskz_loadu_ps(first(count), from)}; }
    void store(float* to) const { _mm512_storeu_ps(to, v); }
    void store(float* to, int count) const { _mm512_mask_storeu_ps(to, first(count), v); }
    float sum() const { return _mm512_reduce_add_ps(v); }
    float max() const { return _mm512_reduce_max_ps(v); }

private:
    static __mmask16 first(int count) { return static_cast<__mmask16>((1u << count) - 1); }
};

inline Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Floats operator-(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Floats operator/(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Floats max(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Floats min(Floats a, Floats b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Floats round(Floats a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// a * 2**n, for whole n.
inline Floats scale_by_power(Floats a, Floats n) { return {_mm512_scalef_ps(a.v, n.v)}; }

// e4m3 codes as floats, 2**8 too small: moved into the bits of an fp16, whose exponent bias is larger by 8. Subnormals
// come out right; the codes of NaN are put in by hand, since fp16 has its own.
inline Floats widen(const std::uint8_t* codes) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
    const __m256i shifted = _mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes), 7);
    const __m256i halves = _mm256_and_si256(shifted, _mm256_set1_epi16(static_cast<short>(0xBFFF)));
    const __m256i magnitude = _mm256_set1_epi16(0x3F80);
    const __mmask16 is_nan = _mm256_cmpeq_epi16_mask(_mm256_and_si256(halves, magnitude), magnitude);
    return {_mm512_cvtph_ps(_mm256_mask_mov_epi16(halves, is_nan, _mm256_set1_epi16(0x7E00)))};
}

struct Bf16 { std::uint16_t bits; };

inline Floats widen(const Bf16* codes) {
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16))};
}

inline Floats widen(const Bf16* codes, int count) {
    const __m256i words = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), codes);
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16))};
}

#else

struct Floats {
    static constexpr int width = 8;
    __m256 v;

    static Floats zero() { return {_mm256_setzero_ps()}; }
    static Floats broadcast(float value) { return {_mm256_set1_ps(value)}; }
    static Floats load(const float* from) { return {_mm256_loadu_ps(from)}; }
    static Floats load(const float* from, int count) { return {_mm256_maskload_ps(from, first(count))}; }
    void store(float* to) const { _mm256_storeu_ps(to, v); }
    void store(float* to, int count) const { _mm256_maskstore_ps(to, first(count), v); }

    float sum() const {
        const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
    }
    float max() const {
        const __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
    }

private:
    static __m256i first(int count) {
        return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    }
};

inline Floats operator+(Floats a, Floats b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Floats operator-(Floats a, Floats b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Floats operator*(Floats a, Floats b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Floats operator/(Floats a, Floats b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Floats max(Floats a, Floats b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Floats min(Floats a, Floats b) { return {_mm256_min_ps(a.v, b.v)}; }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Floats round(Floats a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// a * 2**n, for whole n in [-126, 127].
inline Floats scale_by_power(Floats a, Floats n) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
    return a * Floats{_mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23))};
}

// As above, eight at a time.
inline Floats widen(const std::uint8_t* codes) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes));
    const __m128i shifted = _mm_slli_epi16(_mm_cvtepi8_epi16(bytes), 7);
    const __m128i halves = _mm_and_si128(shifted, _mm_set1_epi16(static_cast<short>(0xBFFF)));
    const __m128i magnitude = _mm_set1_epi16(0x3F80);
    const __m128i is_nan = _mm_cmpeq_epi16(_mm_and_si128(halves, magnitude), magnitude);
    return {_mm256_cvtph_ps(_mm_blendv_epi8(halves, _mm_set1_epi16(0x7E00), is_nan))};
}

struct Bf16 { std::uint16_t bits; };

inline Floats widen(const Bf16* codes) {
    const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16))};
}

inline Floats widen(const Bf16* codes, int count) {
    Bf16 padded[Floats::width] = {};
    std::memcpy(padded, codes, sizeof(Bf16) * count);
    return widen(padded);
}

#endif

inline Floats widen(const float* values) { return Floats::load(values); }
inline Floats widen(const float* values, int count) { return Floats::load(values, count); }

// To the nearest bf16, of two the even one.
inline Bf16 round_to_bf16(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    if (value != value) return {0x7FC0};
    return {static_cast<std::uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}

template <int COUNT, class Code>
inline void widen_all(const Code* codes, Floats (&out)[COUNT]) {
    for (int i = 0; i < COUNT; ++i) out[i] = widen(codes + i * Floats::width);
}

#if defined(__AVX512VBMI__)

// The upper and the lower byte of the bf16 of each e4m3 code without a sign; like the above 2**8 too small.
struct Bf16Tables {
    alignas(64) std::uint8_t upper[128], lower[128];

    constexpr Bf16Tables() : upper(), lower() {
        for (int code = 0; code < 128; ++code) {
            const int exponent = code >> 3, mantissa = code & 7;
            int bits = (exponent + 127 - 7 - 8) << 7 | mantissa << 4;
            if (code == 0x7F) bits = 0x7FC0;
            if (exponent == 0) {
                const int top = mantissa >> 2 ? 2 : mantissa >> 1;  // of the subnormal's bits
                bits = mantissa ? (top + 127 - 9 - 8) << 7 | ((mantissa << (7 - top)) & 0x7F) : 0;
            }
            upper[code] = static_cast<std::uint8_t>(bits >> 8);
            lower[code] = static_cast<std::uint8_t>(bits & 0xFF);
        }
    }
};
inline constexpr Bf16Tables BF16_TABLES;

// The bf16 of 64 codes: those of the first eight bytes of each 16 in `low`, the others' in `high`.
inline void widen_to_bf16(__m512i code, __m512i& low, __m512i& high) {
    const auto of = [&](const std::uint8_t* table) {
        return _mm512_permutex2var_epi8(_mm512_load_si512(table), code, _mm512_load_si512(table + 64));
    };
    constexpr int OR_OF_AND = 0xF8;  // a | (b & c)
    const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
    const __m512i upper = _mm512_ternarylogic_epi32(of(BF16_TABLES.upper), code, sign, OR_OF_AND);
    const __m512i lower = of(BF16_TABLES.lower);
    low = _mm512_unpacklo_epi8(lower, upper);
    high = _mm512_unpackhi_epi8(lower, upper);
}

// 64 codes at a time by table: half the instructions. Bytes are interleaved within 128 bits, so the codes are put into
// that order first.
inline void widen_all(const std::uint8_t* codes, Floats (&out)[4]) {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m512i low, high;
    widen_to_bf16(_mm512_permutexvar_epi32(order, _mm512_loadu_si512(codes)), low, high);
    const __m512i zero = _mm512_setzero_si512();
    out[0].v = _mm512_castsi512_ps(_mm512_unpacklo_epi16(zero, low));
    out[1].v = _mm512_castsi512_ps(_mm512_unpackhi_epi16(zero, low));
    out[2].v = _mm512_castsi512_ps(_mm512_unpacklo_epi16(zero, high));
    out[3].v = _mm512_castsi512_ps(_mm512_unpackhi_epi16(zero, high));
}

#endif

#if defined(__AVX512BF16__)

// Two inputs side by side, as the processor multiplies bf16: of a row, or of a weight (mull_pack's order).
struct Pair { std::uint16_t bits[2]; };
struct E4m3Pair { std::uint8_t codes[2]; };
struct Bf16Pair { std::uint16_t bits[2]; };

// 16 of them.
struct Pairs {
    __m512i v;

    static Pairs broadcast(Pair value) {
        std::int32_t bits;
        std::memcpy(&bits, &value, sizeof(bits));
        return {_mm512_set1_epi32(bits)};
    }
};

// c + a[0] * b[0] + a[1] * b[1], summed in fp32.
inline Floats multiply_add(Pairs a, Pairs b, Floats c) {
    return {_mm512_dpbf16_ps(c.v, (__m512bh)a.v, (__m512bh)b.v)};
}

inline void widen_all(const E4m3Pair* codes, Pairs (&out)[2]) {
    widen_to_bf16(_mm512_loadu_si512(codes), out[0].v, out[1].v);
}

inline void widen_all(const Bf16Pair* codes, Pairs (&out)[2]) {
    for (int i = 0; i < 2; ++i) out[i].v = _mm512_loadu_si512(codes + i * Floats::width);
}

inline void widen_all(const Pair* pairs, Pairs (&out)[2]) {
    for (int i = 0; i < 2; ++i) out[i].v = _mm512_loadu_si512(pairs + i * Floats::width);
}

// Rounds `count` floats, an even number, to the nearest bf16, of two the even one.
inline void round_to_pairs(const float* from, int count, Pair* to) {
    for (int i = 0; i < count; i += Floats::width) {
        const int width = count - i < Floats::width ? count - i : Floats::width;
        const __m256bh halves = _mm512_cvtneps_pbh(Floats::load(from + i, width).v);
        _mm256_mask_storeu_epi16(to + i / 2, static_cast<__mmask16>((1u << width) - 1), (__m256i)halves);
    }
}

// Pairs of one value of each row, rounded.
inline void round_to_pairs(const float* first, const float* second, int count, Pair* to) {
    for (int i = 0; i < count; i += Floats::width) {
        const int width = count - i < Floats::width ? count - i : Floats::width;
        const auto words = [&](const float* from) {
            return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(Floats::load(from + i, width).v));
        };
        const __m512i pairs = _mm512_or_si512(words(first), _mm512_slli_epi32(words(second), 16));
        _mm512_mask_storeu_epi32(to + i, static_cast<__mmask16>((1u << width) - 1), pairs);
    }
}

#endif

// e**x to one or two units in the last place. Below the normal numbers it stays at the smallest.
inline Floats exp(Floats x) {
    const auto constant = [](float value) { return Floats::broadcast(value); };
    x = min(max(x, constant(-87.33f)), constant(88.37f));
    const Floats n = round(x * constant(1.44269504f));
    const Floats r = multiply_add(n, constant(2.12194440e-4f), multiply_add(n, constant(-0.693359375f), x));
    Floats p = constant(1.9875691500e-4f);
    p = multiply_add(p, r, constant(1.3981999507e-3f));
    p = multiply_add(p, r, constant(8.3334519073e-3f));
    p = multiply_add(p, r, constant(4.1665795894e-2f));
    p = multiply_add(p, r, constant(1.6666665459e-1f));
    p = multiply_add(p, r, constant(5.0000001201e-1f));
    p = multiply_add(p, r * r, r + constant(1.0f));
    return scale_by_power(p, n);
}

}  // namespace mull
