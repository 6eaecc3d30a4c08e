"""The training layout and the quantisation give what the plain forms give."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest
import torch
from pocket_training.batches import Row, lay_out
from pocket_training.export import export
from pocket_training.mixture import SHARES, Mixture
from pocket_training.model import Pocket, PocketConfig
from pocket_training.muon import orthogonalise
from pocket_training.quantise import dequantise, quantise
from pocket_training.reference_engine import GREEDY, ReferenceEngine, read_checkpoint
from pocket_training.tokenizer import SPECIAL_TOKENS, ChatTemplate, ProblemEncoder
from tokenizers import Tokenizer

POCKET = Path(__file__).resolve().parents[2] / "deploy" / "models" / "pocket"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(POCKET / "tokenizer.json"))


@pytest.fixture(scope="module")
def encoder(tokenizer: Tokenizer) -> ProblemEncoder:
    return ProblemEncoder(tokenizer, ChatTemplate.own())


def test_problems_that_share_a_beginning_train_as_if_alone(encoder: ProblemEncoder) -> None:
    mixture, rng = Mixture("Tools:\n{tool_descs}"), Random(0)
    family = next(each for each in iter(lambda: mixture.train_family(rng, dict(SHARES)), []) if len(each) > 1)
    encoded = [encoder.encode(problem) for problem in family]
    model = Pocket(PocketConfig())

    shared = lay_out([[Row([problem.skill for problem in family], encoded)]])
    alone = lay_out([[Row([problem.skill], [each])] for problem, each in zip(family, encoded, strict=True)])

    assert len(shared.flat.ids_T) < len(alone.flat.ids_T)
    # float32 sums in another order
    torch.testing.assert_close(model(shared.flat)[0], model(alone.flat)[0], atol=1e-4, rtol=1e-4)


def test_quantised_weights_are_within_half_an_e4m3_step() -> None:
    weight = torch.randn(256, 384)

    values, scale = quantise(weight)

    assert (values.dtype, scale.dtype, scale.shape) == (torch.float8_e4m3fn, torch.bfloat16, (2, 3))
    # three mantissa bits: half a step is 1/16 of the value; below the smallest normal the step is constant
    error, smallest = (dequantise(values, scale) - weight).abs(), scale.float().max() * 2**-10
    assert (error <= weight.abs() / 16 + smallest).all()


def test_muon_updates_have_singular_values_near_one() -> None:
    singular = torch.linalg.svdvals(orthogonalise(torch.randn(3, 64, 32)))

    # the published iteration lands between about 0.7 and 1.2 by design
    assert singular.min() > 0.5
    assert singular.max() < 1.3


def test_an_exported_checkpoint_reads_back_as_its_quantised_weights(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = Pocket(PocketConfig())

    export(model, tokenizer, tmp_path / "out")
    read = read_checkpoint(tmp_path / "out")

    expected = dequantise(*quantise(model.layers[1].experts.down[3].detach()))
    assert torch.equal(read.layers[1].experts.down[3], expected)
    assert torch.equal(read.layers[0].experts.gate, model.layers[0].experts.gate.to(torch.bfloat16).float())


def test_the_built_in_checkpoint_is_small_and_every_indexed_tensor_is_there() -> None:
    index = json.loads((POCKET / "model.safetensors.index.json").read_text())

    assert len(set(index["weight_map"].values())) >= 2
    assert sum(path.stat().st_size for path in POCKET.iterdir()) <= 8_000_000
    assert all(name in index["weight_map"] for name in index["weight_map"] if name.endswith("_scale_inv"))
    read_checkpoint(POCKET)


def test_tags_of_thoughts_and_tools_are_one_token_and_not_special(tokenizer: Tokenizer) -> None:
    added = tokenizer.get_added_tokens_decoder()

    for tag in ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"):
        assert tokenizer.encode(tag).ids == [tokenizer.token_to_id(tag)]
        assert not added[tokenizer.token_to_id(tag)].special
    assert all(added[tokenizer.token_to_id(token)].special for token in SPECIAL_TOKENS)


def test_generation_does_not_depend_on_the_batch(encoder: ProblemEncoder, tokenizer: Tokenizer) -> None:
    engine = ReferenceEngine(POCKET, stop_ids=frozenset([tokenizer.token_to_id("<|im_end|>")]))
    asked = [[{"role": "user", "content": text}] for text in ("What is 12 + 7?", "Hello", "Reverse the word garden.")]
    prompts = [encoder.tokenizer.encode(encoder.template.render(messages)).ids for messages in asked]

    together = engine.generate(prompts, 40, GREEDY)

    assert together == [engine.generate([prompt], 40, GREEDY)[0] for prompt in prompts]
