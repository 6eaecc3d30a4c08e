"""Sizes of recorded decode steps."""

from __future__ import annotations

import pytest

from workers.buckets import MAX_KEYS, Bucket, Buckets


@pytest.mark.parametrize("max_rows", [1, 2, 3, 16, 17, 40, 64, 200, 256])
def test_every_number_of_rows_has_a_size_that_is_not_twice_as_many(max_rows: int) -> None:
    buckets = Buckets(max_rows, 4096)
    for num_rows in range(1, max_rows + 1):
        size = buckets.rows_for(num_rows)
        assert size is not None
        assert num_rows <= size < 2 * num_rows or size == num_rows == 1
        assert size <= max_rows
    assert buckets.rows_for(max_rows + 1) is None


def test_sizes_are_recorded_from_the_largest_down_and_found_again() -> None:
    buckets = Buckets(40, 20_000)
    assert buckets.row_sizes == [1, 2, 4, 8, 16, 24, 32, 40]
    assert buckets.lengths == [4096, 16384, 20_000]
    assert next(iter(buckets)) == Bucket(40, 20_000)
    assert buckets.bucket_for(33, 16_385) == Bucket(40, 20_000)
    assert buckets.bucket_for(5, 4096) == Bucket(8, 4096)
    assert buckets.bucket_for(5, 20_001) is None


def test_many_rows_of_which_one_is_very_long_have_no_size() -> None:
    buckets = Buckets(256, 262_144)
    assert buckets.bucket_for(64, 262_144) == Bucket(64, 262_144)
    assert buckets.bucket_for(65, 262_144) is None
    assert buckets.bucket_for(256, 65_536) == Bucket(256, 65_536)
    assert max(bucket.num_rows * bucket.longest for bucket in buckets) == MAX_KEYS


def test_sizes_that_no_fewer_rows_are_padded_to_are_known() -> None:
    buckets = Buckets(9, 4096)
    assert [size for size in buckets.row_sizes if buckets.can_be_padded(size)] == [4, 8]
