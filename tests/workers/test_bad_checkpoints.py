"""Every directory that cannot be served: one line that names the file and the remedy, before any weight is read."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import DENSE, MOE, read_tensors, write_checkpoint, write_shards
from workers.checkpoint import Checkpoint
from workers.config import ModelConfig, ParallelLayout, ShardSpec
from workers.errors import CheckpointError
from workers.safetensors_header import check_checkpoint

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
DEEP = b"[" * 200_000
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("good"), DENSE, fp8=True)


@pytest.fixture
def directory(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "model"))


def edit_json(file: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(file.read_text())
    edit(values)
    file.write_text(json.dumps(values))


def set_config(**changes: Any) -> Callable[[Path], None]:
    return lambda directory: edit_json(directory / "config.json", lambda values: values.update(changes))


def set_moe(**changes: Any) -> Callable[[Path], None]:
    return set_config(**(MOE | changes))


def drop_config(name: str) -> Callable[[Path], None]:
    return lambda directory: edit_json(directory / "config.json", lambda values: values.pop(name))


def point_index_to(file: str) -> Callable[[Path], None]:
    return lambda directory: edit_json(directory / INDEX, lambda values: values["weight_map"].update({Q_PROJ: file}))


def truncate(file: str, keep: float) -> Callable[[Path], None]:
    def cut(directory: Path) -> None:
        data = (directory / file).read_bytes()
        (directory / file).write_bytes(data[: int(len(data) * keep)])

    return cut


def write_bytes(file: str, data: bytes) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        (directory / file).write_bytes(data)

    return write


def change_header(edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        data = (directory / FIRST).read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        edit(header)
        encoded = json.dumps(header).encode()
        (directory / FIRST).write_bytes(struct.pack("<Q", len(encoded)) + encoded + data[8 + length :])

    return change


def replace_tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def replace(directory: Path) -> None:
        tensors = read_tensors(directory)
        edit(tensors)
        write_shards(directory, tensors, num_shards=2)

    return replace


def overlap(header: dict[str, Any]) -> None:
    """Give one of two tensors of the same size the place of the other."""
    by_size: dict[int, dict[str, Any]] = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"] if name != "__metadata__" else (0, 0)
        if end > begin and by_size.setdefault(end - begin, entry) is not entry:
            entry["data_offsets"] = by_size[end - begin]["data_offsets"]
            return


def with_header(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header


def first_entry(header: dict[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = next(value for name, value in header.items() if name != "__metadata__")
    return entry


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda directory: (directory / "config.json").unlink(), "config.json: missing; point to"),
    "config is no JSON": (write_bytes("config.json", b"{"), "config.json: not readable as JSON"),
    "config is a list": (write_bytes("config.json", b"[]"), "config.json: not a JSON object"),
    "unknown architecture": (
        set_config(architectures=["LlamaForCausalLM"]),
        "config.json: unknown architecture ['LlamaForCausalLM']; mull serves Qwen3ForCausalLM, Qwen3MoeForCausalLM",
    ),
    "no architecture": (drop_config("architectures"), "config.json: unknown architecture None"),
    "missing dimension": (drop_config("hidden_size"), "config.json: hidden_size is None"),
    "negative dimension": (set_config(num_hidden_layers=-1), "config.json: num_hidden_layers is -1"),
    "heads that do not share": (set_config(num_key_value_heads=3), "config.json: 4 heads over 3 KV heads"),
    "code of its own": (
        set_config(auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"}),
        "config.json: auto_map asks for code of the checkpoint's own; no such code is run",
    ),
    "attention bias": (set_config(attention_bias=True), "config.json: attention_bias is true"),
    "theta that is no number": (
        set_config(rope_parameters={"rope_theta": "x"}),
        "config.json: rope_theta is 'x', not a positive number",
    ),
    "theta of null": (set_config(rope_parameters={"rope_theta": None}), "config.json: rope_theta is None, not a"),
    "theta NaN": (set_config(rope_theta=float("nan")), "config.json: rope_theta is nan, not a positive number"),
    "theta infinite": (set_config(rope_theta=float("inf")), "config.json: rope_theta is inf, not a positive number"),
    "theta beyond floats": (set_config(rope_theta=10**400), "config.json: rope_theta is 1000"),
    "rope parameters in a list": (
        set_config(rope_parameters=[1]),
        "config.json: rope_parameters is [1], not an object",
    ),
    "rope scaling by name": (set_config(rope_scaling="yarn"), "config.json: rope_scaling is 'yarn', not an object"),
    "end of sequence of true": (set_config(eos_token_id=True), "config.json: eos_token_id is True, not token ids"),
    "end of sequence outside": (
        set_config(eos_token_id=[300, 301]),
        "config.json: eos_token_id is [300, 301], not token ids of the vocabulary, of which there are 301; fix",
    ),
    "dense layers by name": (set_moe(mlp_only_layers=["a"]), "config.json: mlp_only_layers is ['a'], not layers"),
    "dense layers past the last": (set_moe(mlp_only_layers=3), "config.json: mlp_only_layers is 3, not layers"),
    "flag that is a word": (set_config(tie_word_embeddings="false"), "config.json: tie_word_embeddings is 'false'"),
    "architecture in a list": (set_config(architectures=[["x"]]), "config.json: unknown architecture [['x']]"),
    "config nested too deeply": (write_bytes("config.json", DEEP), "config.json: not readable as JSON"),
    "header nested too deeply": (write_bytes(FIRST, with_header(DEEP)), f"{FIRST}: corrupt safetensors header"),
    "index nested too deeply": (write_bytes(INDEX, DEEP), f"{INDEX}: no readable weight_map"),
    "tensors that overlap": (change_header(overlap), " overlap); download it again"),
    "scaled rope": (set_config(rope_scaling={"rope_type": "yarn", "factor": 4}), "config.json: RoPE scaling 'yarn'"),
    "other quantization": (
        set_config(quantization_config={"quant_method": "awq"}),
        "config.json: unsupported quantization 'awq'; mull serves fp8",
    ),
    "unblocked fp8": (set_config(quantization_config={"quant_method": "fp8"}), "unsupported weight_block_size None"),
    "fp8 without quantization_config": (
        drop_config("quantization_config"),
        "is F8_E4M3; config.json lacks quantization_config",
    ),
    "no weights": (
        lambda directory: [file.unlink() for file in (*directory.glob("*.safetensors"), directory / INDEX)],
        "model: neither model.safetensors.index.json nor model.safetensors; download",
    ),
    "missing shard": (lambda directory: (directory / SECOND).unlink(), f"{SECOND}: shard is missing; download it"),
    "truncated data": (truncate(FIRST, 0.9), f"{FIRST}: truncated: "),
    "truncated header": (truncate(FIRST, 0.0005), f"{FIRST}: truncated inside its header"),
    "empty file": (write_bytes(FIRST, b""), f"{FIRST}: not a safetensors file"),
    "not safetensors": (write_bytes(FIRST, b"<html>" * 99), f"{FIRST}: not a safetensors file"),
    "header is no JSON": (
        write_bytes(FIRST, struct.pack("<Q", 4) + b"\xff\xfe{}"),
        f"{FIRST}: corrupt safetensors header",
    ),
    "entry without offsets": (
        change_header(lambda header: first_entry(header).pop("data_offsets")),
        f"{FIRST}: corrupt safetensors header (entry",
    ),
    "negative offset": (
        change_header(lambda header: first_entry(header).update(data_offsets=[-5, 10])),
        f"{FIRST}: corrupt safetensors header (entry",
    ),
    "size that does not fit its shape": (
        change_header(lambda header: first_entry(header).update(data_offsets=[0, 3])),
        f"{FIRST}: ",
    ),
    "index is no JSON": (write_bytes(INDEX, b"nope"), f"{INDEX}: no readable weight_map"),
    "index maps to numbers": (point_index_to(5), f"{INDEX}: weight_map is not a mapping"),
    "path traversal": (
        point_index_to("../../etc/passwd.safetensors"),
        f"{INDEX}: '../../etc/passwd.safetensors' is not",
    ),
    "absolute path": (point_index_to("/etc/x.safetensors"), f"{INDEX}: '/etc/x.safetensors' is not"),
    "parent directory": (point_index_to(".."), f"{INDEX}: '..' is not"),
    "pickle": (point_index_to("pytorch_model.bin"), f"{INDEX}: 'pytorch_model.bin' is not"),
    "index names the wrong shard": (
        lambda directory: edit_json(directory / INDEX, lambda values: values.update(weight_map=_swapped(values))),
        "not in the file that should hold it",
    ),
    "missing tensor": (
        replace_tensors(lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight")),
        f"{INDEX}: model.layers.1.mlp.up_proj.weight: the tensor is missing",
    ),
    "missing scales": (
        replace_tensors(lambda tensors: tensors.pop(f"{Q_PROJ}_scale_inv")),
        f"{INDEX}: {Q_PROJ}_scale_inv: the scales are missing",
    ),
    "wrong shape": (
        replace_tensors(lambda tensors: tensors.update({"model.norm.weight": torch.ones(5)})),
        "model.norm.weight has shape [5], config.json implies [256]",
    ),
    "wrong dtype": (
        replace_tensors(lambda tensors: tensors.update({"model.norm.weight": torch.ones(256).to(torch.float8_e4m3fn)})),
        "model.norm.weight is F8_E4M3; expected BF16, F16 or F32",
    ),
    "wrong scale shape": (
        replace_tensors(lambda tensors: tensors.update({f"{Q_PROJ}_scale_inv": torch.ones(1, 1)})),
        f"{Q_PROJ}_scale_inv is F32 [1, 1], expected floats [4, 2]",
    ),
}


def _swapped(index: dict[str, Any]) -> dict[str, str]:
    return {name: SECOND if file == FIRST else FIRST for name, file in index["weight_map"].items()}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_directory_is_refused_with_one_line_naming_file_and_remedy(name: str, directory: Path) -> None:
    spoil, message = BAD[name]
    spoil(directory)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(directory)
    text = str(caught.value)
    assert message in text
    assert "\n" not in text
    assert ";" in text, "a remedy follows the problem"


def test_a_directory_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: no such model directory"):
        Checkpoint.open(tmp_path / "nowhere")


def test_a_file_cut_after_the_check_is_named_by_the_reader(directory: Path) -> None:
    checkpoint = Checkpoint.open(directory)
    truncate(FIRST, 0.5)(directory)
    with pytest.raises(CheckpointError, match=f"{FIRST}: ends inside"):
        checkpoint.read(ShardSpec(ParallelLayout(tp=1), 0))


def test_a_good_directory_passes_the_check(good: Path) -> None:
    assert Q_PROJ in check_checkpoint(good, ModelConfig.from_dir(good))


def test_an_unused_head_of_a_tied_model_is_ignored(directory: Path) -> None:
    replace_tensors(lambda tensors: tensors.update({"lm_head.weight": torch.ones(2, 2)}))(directory)
    assert "lm_head" not in Checkpoint.open(directory).read(ShardSpec(ParallelLayout(tp=1), 0))
