"""Merged checkpoints: transformers loads them and computes what we did; all else is the base's; whole or not there."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import checkpoints
import disks
import support
from adaptax.config import UserError
from adaptax.export import save_peft_adapter
from adaptax.lora import LoraSpec
from adaptax.merge import MergeReport, check_merged, save_merged
from adaptax.models import Architecture, find_architecture
from adaptax.models.gemma3_weights import LINEARS
from adaptax.models.hub import CARRIED_FILES, EXPORT_FILES, HUB_FILES

GOLDEN = Path(__file__).parent / "golden"
BF16 = np.dtype(ml_dtypes.bfloat16)
SOME = {"attn/kv_einsum": (2, 5), "attn/q_einsum": (5,), "mlp/down_proj": tuple(range(8))}
Tensors = dict[str, np.ndarray]


def read(directory: Path) -> Tensors:
    """All tensors of a checkpoint, by the library's own reader."""
    tensors: Tensors = {}
    for path in directory.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


def rewrite(source: Path, target: Path, change) -> Path:
    """A copy of a checkpoint with its tensors passed through ``change``."""
    target.mkdir(parents=True)
    shutil.copy(source / "config.json", target)
    save_file(change(read(source)), target / "model.safetensors")
    return target


def exact_adapters(arch: Architecture, spec: LoraSpec, seed: int = 0) -> Tensors:
    """Adapters whose products are exact in float32, in whatever order they are summed; no rank is left over as zero."""
    rng, adapters = np.random.default_rng(seed), {}
    for kind, layers in spec.layers.items():
        (_, num_in), (_, num_out) = support.FAMILY.checkpoint.adapter_axes(arch, kind)
        rank = spec.stacked_rank(kind)
        for side, shape in (("a", (num_in, rank)), ("b", (rank, num_out))):
            values = rng.integers(-8, 9, (len(layers), *shape))
            adapters[f"layers/{kind}/w_lora_{side}"] = (values / 64).astype(np.float32)
    return adapters


def expected_updates(adapters: Mapping[str, np.ndarray], spec: LoraSpec, prefix: str) -> Tensors:
    """Tensor name -> scale (A B), [out, in], in float64."""
    updates = {}
    for kind, layers in spec.layers.items():
        for place, layer in enumerate(layers):
            rank = spec.rank_of(kind, layer)
            a, b = (adapters[f"layers/{kind}/w_lora_{side}"][place].astype(np.float64) for side in "ab")
            update = spec.scale_of(kind, layer) * (a[:, :rank] @ b[:rank]).T
            names = LINEARS[kind].tensors
            for name, part in zip(names, np.split(update, len(names)), strict=True):
                updates[f"{prefix}layers.{layer}.{name}.weight"] = part
    return updates


def merge(target: Path, base: Path, spec: LoraSpec | None = None, **changes) -> tuple[MergeReport, Tensors]:
    """Merges exact adapters; the report, and what is added to which tensor."""
    arch = find_architecture(support.model_config(base))
    spec = spec or support.full_spec(arch, rank=4, alpha=8.0)
    adapters = exact_adapters(arch, spec)
    report = save_merged(target, base, adapters, spec, support.FAMILY, arch, **changes)
    prefix = support.FAMILY.checkpoint.text_prefix(read(base))
    return report, expected_updates(adapters, spec, prefix)


def bits(array: np.ndarray) -> bytes:
    return array.tobytes()


# What it computes


def as_resaved(tensors: Tensors) -> Tensors:
    """The names of a multimodal checkpoint as other versions of transformers write them."""

    def rename(name: str) -> str:
        if name.startswith("language_model.model."):
            return name.replace("language_model.model.", "model.language_model.", 1)
        return f"model.{name}"

    return {rename(name): array for name, array in tensors.items()}


@pytest.mark.parametrize(
    ("kind", "layers", "shard_bytes"),
    [("text", SOME, 1 << 30), ("published", None, 200_000), ("resaved", SOME, 1 << 30)],
    ids=["text", "published", "resaved"],
)
def test_transformers_loads_it_and_computes_what_peft_merges(
    kind: str, layers: dict | None, shard_bytes: int, tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    model = checkpoints.build_text_model(seed=5) if kind == "text" else checkpoints.build_multimodal_model(seed=5)
    source = checkpoints.save(model, tmp_path / "base", max_shard_size="150KB")
    assert len(list(source.glob("*.safetensors"))) > 1
    if kind == "resaved":
        source = rewrite(source, tmp_path / "resaved", as_resaved)
    arch, base = support.open_checkpoint(source)
    spec = support.full_spec(arch, rank=4, alpha=6.0, **({"layers": layers} if layers else {}))
    adapters = support.random_adapters(arch, spec, support.make_mesh())
    host = {path: np.asarray(array) for path, array in adapters.items()}
    save_merged(tmp_path / "merged", source, host, spec, support.FAMILY, arch, max_shard_bytes=shard_bytes)

    loaded, told = type(model).from_pretrained(
        tmp_path / "merged", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    tokens = np.random.default_rng(2).integers(4, 2000, (2, 40))
    with torch.no_grad():
        plain = model(input_ids=torch.tensor(tokens)).logits.numpy()
    save_peft_adapter(tmp_path / "adapter", host, spec, support.FAMILY, arch, str(source))
    theirs = peft.PeftModel.from_pretrained(model, str(tmp_path / "adapter")).merge_and_unload()
    with torch.no_grad():
        merged, reference = (m.eval()(input_ids=torch.tensor(tokens)).logits.numpy() for m in (loaded, theirs))
    assert np.abs(merged - reference).max() <= 1e-5
    assert np.abs(merged - plain).max() > 1e-2
    if kind != "resaved":  # the numbers are those of the published one
        ours = support.logits(support.make_program(arch, spec, support.make_mesh()), base, adapters, tokens)
        assert np.abs(merged - ours).max() <= 1e-4


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BF16, np.dtype(np.float16)], ids=["F32", "BF16", "F16"])
@pytest.mark.parametrize("golden", ["text", "multimodal"])
def test_every_weight_is_the_float32_sum_rounded_once_and_all_else_is_the_bases(
    golden: str, dtype: np.dtype, tmp_path: Path
) -> None:
    base = rewrite(GOLDEN / golden, tmp_path / "base", lambda ts: {n: t.astype(dtype) for n, t in ts.items()})
    report, updates = merge(tmp_path / "merged", base)
    before, after = read(base), read(tmp_path / "merged")
    assert before.keys() == after.keys()
    for name, array in before.items():
        assert after[name].dtype == dtype
        merged = array
        if name in updates:
            merged = (array.astype(np.float64) + updates[name]).astype(np.float32).astype(dtype)
            assert bits(merged) != bits(array)
        assert bits(after[name]) == bits(merged), name
    assert report.num_merged == len(updates) == 8 * 7
    assert report.num_carried == len(before) - len(updates)
    assert report.dtypes == ({"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype.name],)
    with safe_open(tmp_path / "merged" / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("use_rslora", [False, True], ids=["plain", "rslora"])
def test_modules_have_ranks_alphas_and_scales_of_their_own(use_rslora: bool, tmp_path: Path) -> None:
    """What a lower rank leaves over in the stacked arrays is no part of it, zero or not."""
    ranks = {"layers/2/attn/kv_einsum": 1, "layers/3/mlp/down_proj": 8}
    alphas = {"layers/2/attn/kv_einsum": 16.0, "layers/5/attn/q_einsum": 1.0}
    spec = LoraSpec(SOME, rank=4, alpha=8.0, use_rslora=use_rslora, ranks=ranks, alphas=alphas)
    report, updates = merge(tmp_path / "merged", GOLDEN / "text", spec)
    before, after = read(GOLDEN / "text"), read(tmp_path / "merged")
    for name, array in before.items():
        np.testing.assert_allclose(after[name], array + updates.get(name, 0.0), rtol=0, atol=1e-6)
    assert report.changes.keys() == updates.keys()
    assert report.num_merged == 2 * 2 + 1 + 8


def test_a_matrix_of_many_pieces_is_merged_as_one_of_a_single_piece(tmp_path: Path, monkeypatch) -> None:
    merge(tmp_path / "whole", GOLDEN / "text")
    monkeypatch.setattr("adaptax.tensor_files.READ_BYTES", 5 * 32 * 4)  # five rows of the width of the model
    merge(tmp_path / "pieced", GOLDEN / "text")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "pieced")]
    assert files[0] == files[1]


def test_how_far_modules_moved_is_told_and_those_that_did_not(tmp_path: Path) -> None:
    arch = find_architecture(support.model_config(GOLDEN / "text"))
    spec = support.full_spec(arch, rank=4, alpha=8.0, layers=SOME)
    adapters = exact_adapters(arch, spec)
    adapters["layers/attn/q_einsum/w_lora_b"][:] = 0
    report = save_merged(tmp_path / "merged", GOLDEN / "text", adapters, spec, support.FAMILY, arch)
    before, after = read(GOLDEN / "text"), read(tmp_path / "merged")
    moved = {name: (after[name] - before[name], before[name]) for name in report.changes}
    assert report.largest_change == max(np.abs(change).max() for change, _ in moved.values()) > 0
    relative = max(np.linalg.norm(change) / np.linalg.norm(weight) for change, weight in moved.values())
    assert report.largest_relative_change == pytest.approx(relative, rel=1e-5)
    assert report.unchanged == ("model.layers.5.self_attn.q_proj.weight",)
    json.dumps(dataclasses.asdict(report))


def test_an_update_that_the_stored_type_cannot_hold_is_refused(tmp_path: Path) -> None:
    base = rewrite(GOLDEN / "text", tmp_path / "base", lambda ts: {n: t.astype(np.float16) for n, t in ts.items()})
    arch = find_architecture(support.model_config(base))
    spec = support.full_spec(arch, rank=4, alpha=4e7, layers={"mlp/up_proj": (3,)})
    with pytest.raises(UserError, match=r"model\.layers\.3\.mlp\.up_proj\.weight has values that are not finite.*F16"):
        save_merged(tmp_path / "merged", base, exact_adapters(arch, spec), spec, support.FAMILY, arch)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


# What it is made of


def test_files_are_as_large_as_asked_and_the_index_names_every_tensor(tmp_path: Path) -> None:
    limit = 100_000
    report, _ = merge(tmp_path / "merged", GOLDEN / "multimodal", max_shard_bytes=limit)
    merge(tmp_path / "single", GOLDEN / "multimodal")
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "merged").glob("*.safetensors"))
    num_files = len(files)
    assert num_files >= 4
    assert [path.name for path in files] == [
        f"model-{i + 1:05d}-of-{num_files:05d}.safetensors" for i in range(num_files)
    ]
    tensors = {path.name: load_file(path) for path in files}
    assert index["weight_map"] == {name: file for file, held in tensors.items() for name in held}
    sizes = [sum(array.nbytes for array in held.values()) for held in tensors.values()]
    assert max(sizes) <= limit
    assert index["metadata"]["total_size"] == sum(sizes)
    single = read(tmp_path / "single")
    merged = read(tmp_path / "merged")
    assert single.keys() == merged.keys() == report.tensors.keys()
    assert all(bits(single[name]) == bits(merged[name]) for name in single)


def test_a_second_copy_of_the_tied_head_is_left_out(tmp_path: Path) -> None:
    def with_head(tensors: Tensors) -> Tensors:
        return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].copy()}

    base = rewrite(GOLDEN / "text", tmp_path / "base", with_head)
    merge(tmp_path / "merged", base)
    assert read(tmp_path / "merged").keys() == read(base).keys() - {"lm_head.weight"}


def test_tensors_of_any_type_and_shape_are_carried_over(tmp_path: Path) -> None:
    odd = {
        "vision_tower.flags": np.array([1, 2, 3], np.uint8),
        "vision_tower.position_ids": np.arange(7, dtype=np.int64)[None],
        "vision_tower.scale": np.array(0.1),
        "vision_tower.none": np.zeros((0, 4), np.float32),
    }
    base = rewrite(
        GOLDEN / "multimodal",
        tmp_path / "base",
        lambda ts: {n: t.astype(BF16) if "layers" in n else t for n, t in ts.items()} | odd,
    )
    merge(tmp_path / "merged", base, max_shard_bytes=100_000)
    after = read(tmp_path / "merged")
    for name, array in odd.items():
        assert (after[name].dtype, after[name].shape, bits(after[name])) == (array.dtype, array.shape, bits(array))


def test_what_goes_with_the_weights_is_carried_over_and_nothing_that_runs(tmp_path: Path) -> None:
    base = shutil.copytree(GOLDEN / "text", tmp_path / "base")
    others = ("README.md", "modeling.py", "pytorch_model.bin", "training_args.pt", "model.safetensors.index.json.old")
    for name in (*CARRIED_FILES[2:], *others):
        (base / name).write_bytes(name.encode())
    report, _ = merge(tmp_path / "merged", base)
    made = sorted(path.name for path in (tmp_path / "merged").iterdir())
    assert made == sorted([*CARRIED_FILES, "model.safetensors"]) == sorted(file.name for file in report.files)
    for name in CARRIED_FILES:
        assert (tmp_path / "merged" / name).read_bytes() == (base / name).read_bytes()
    for file in report.files:
        path = tmp_path / "merged" / file.name
        assert path.stat().st_size == file.num_bytes
        summed = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout
        assert summed.split()[0] == file.sha256
    assert {*CARRIED_FILES, *HUB_FILES} == set(EXPORT_FILES)


def test_links_within_the_hubs_cache_are_followed_and_those_that_leave_the_base_are_not(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "0a1b"
    snapshot.mkdir(parents=True)
    shutil.copytree(GOLDEN / "text", blobs)
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).symlink_to(Path("../../blobs") / name)
    merge(tmp_path / "merged", snapshot)
    assert not any(path.is_symlink() for path in (tmp_path / "merged").iterdir())

    secret = tmp_path / "secret"
    secret.write_text("a key")
    (snapshot / "tokenizer.json").symlink_to(secret)
    with pytest.raises(UserError, match=r"tokenizer\.json is a link that leaves its directory"):
        merge(tmp_path / "other", snapshot)
    assert not (tmp_path / "other").exists()


# Whole or not at all


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 320 KiB; tests that need one are skipped where none can be mounted."""
    yield from disks.mount_or_skip(tmp_path / "disk", 320)


def test_a_name_that_is_taken_is_refused(tmp_path: Path) -> None:
    taken, dangling = tmp_path / "taken", tmp_path / "dangling"
    taken.mkdir()
    dangling.symlink_to(tmp_path / "nowhere")
    for path in (taken, dangling):
        with pytest.raises(UserError, match=f"{path} exists"):
            merge(path, GOLDEN / "text")
    assert sorted(tmp_path.iterdir()) == [dangling, taken]
    assert not list(taken.iterdir())


def test_too_little_room_is_told_before_anything_is_written(disk: Path) -> None:
    """The multimodal checkpoint takes 440 KB, the text one 270."""
    with pytest.raises(UserError, match=r"merged takes 0\.000412 GiB, and 0\.000305 GiB are free there: make room"):
        merge(disk / "a" / "merged", GOLDEN / "multimodal")
    assert not list(disk.iterdir())
    merge(disk / "a" / "merged", GOLDEN / "text")


def test_a_disk_that_becomes_full_is_told_and_nothing_is_left(disk: Path, caplog) -> None:
    rules = {"merging 56 modules": ["fill:100000"]}
    with caplog.at_level(logging.INFO, "adaptax"), disks.when_said(disk, rules), pytest.raises(UserError) as caught:
        merge(disk / "merged", GOLDEN / "text")
    assert str(caught.value).startswith(
        f"{disk / 'merged.partial' / 'model.safetensors'} cannot be written: No space left"
    )
    assert [path.name for path in disk.iterdir()] == ["filler"]


def test_an_interrupt_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("adaptax.new_folder.SECONDS_BETWEEN_LINES", 0.0)
    seen = []

    def interrupt(record: logging.LogRecord) -> bool:
        seen.extend(path.name for path in tmp_path.iterdir())
        signal.raise_signal(signal.SIGINT)
        return True

    meter = logging.getLogger("adaptax.new_folder")
    meter.setLevel(logging.INFO)
    meter.addFilter(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            merge(tmp_path / "merged", GOLDEN / "text")
    finally:
        meter.removeFilter(interrupt)
        meter.setLevel(logging.NOTSET)
    assert seen == ["merged.partial"]
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_behind_makes_room(tmp_path: Path) -> None:
    (tmp_path / "merged.partial").mkdir()
    (tmp_path / "merged.partial" / "model-00001-of-00009.safetensors").write_bytes(b"half")
    merge(tmp_path / "merged", GOLDEN / "text")
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    assert sorted(path.name for path in (tmp_path / "merged").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]


def test_a_base_that_is_another_model_is_refused(tmp_path: Path) -> None:
    def damage(tensors: Tensors) -> Tensors:
        del tensors["model.layers.2.mlp.up_proj.weight"]
        return tensors

    with pytest.raises(UserError, match=r"missing model\.layers\.2\.mlp\.up_proj\.weight"):
        merge(tmp_path / "merged", rewrite(GOLDEN / "text", tmp_path / "base", damage))
    assert not (tmp_path / "merged").exists()


# Read again


def flip_weight(directory: Path) -> None:
    """One bit of the last tensor of the second file."""
    path = sorted(directory.glob("*.safetensors"))[1]
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 4
    path.write_bytes(raw)


def swap_names(directory: Path) -> None:
    """Two tensors of one shape change places, which the file's bytes alone tell."""
    path = sorted(directory.glob("*.safetensors"))[1]
    raw, one, other = path.read_bytes(), b".3.mlp.gate_proj", b".3.mlp.up_proj"
    assert one in raw
    assert other in raw
    path.write_bytes(raw.replace(one, b".3.mlp.____").replace(other, one).replace(b".3.mlp.____", other))


def drop_tensor(directory: Path) -> None:
    path = sorted(directory.glob("*.safetensors"))[1]
    tensors = load_file(path)
    tensors.popitem()
    save_file(tensors, path, metadata={"format": "pt"})


def rewrite_file(directory: Path) -> None:
    """The same tensors under another header."""
    path = sorted(directory.glob("*.safetensors"))[1]
    save_file(load_file(path), path, metadata={"format": "np"})


def lengthen_config(directory: Path) -> None:
    with (directory / "config.json").open("a") as file:
        file.write("\n")


def cut_config(directory: Path) -> None:
    (directory / "config.json").write_text("{")


def add_file(directory: Path) -> None:
    (directory / "extra.safetensors").write_bytes(b"")


def remove_index(directory: Path) -> None:
    (directory / "model.safetensors.index.json").unlink()


@pytest.mark.parametrize(
    ("tamper", "words"),
    [
        (flip_weight, r"00002-of-\d+\.safetensors: model\..* is not what was computed"),
        (swap_names, r"model\.layers\.3\.mlp\.(gate|up)_proj\.weight is not what was computed"),
        (drop_tensor, r"model\..* is missing"),
        (rewrite_file, r"00002-of-\d+\.safetensors is not what was written"),
        (lengthen_config, r"config\.json is not what was written"),
        (cut_config, r"config\.json cannot be read: it ends early"),
        (add_file, r"extra\.safetensors was not written"),
        (remove_index, r"index\.json is missing"),
    ],
)
def test_what_is_not_what_was_written_is_found(tamper, words: str, tmp_path: Path) -> None:
    report, _ = merge(tmp_path / "merged", GOLDEN / "text", max_shard_bytes=100_000)
    check_merged(tmp_path / "merged", report)
    tamper(tmp_path / "merged")
    with pytest.raises(UserError, match=words):
        check_merged(tmp_path / "merged", report)


def test_what_a_disk_does_not_keep_is_found_and_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    """The files are damaged between being written and being read again."""
    monkeypatch.setattr("adaptax.new_folder.SECONDS_BETWEEN_LINES", 0.0)
    make = logging.getLogRecordFactory()

    def damage(*args, **kwargs) -> logging.LogRecord:
        record = make(*args, **kwargs)
        path = tmp_path / "merged.partial" / "config.json"
        if record.getMessage().startswith("checked") and path.exists():
            path.write_bytes(path.read_bytes().replace(b"gemma3_text", b"gemma3_next"))
        return record

    monkeypatch.setattr(logging.getLogger("adaptax"), "level", logging.INFO)
    logging.setLogRecordFactory(damage)
    try:
        with pytest.raises(UserError, match=r"config\.json is not what was written"):
            merge(tmp_path / "merged", GOLDEN / "text")
    finally:
        logging.setLogRecordFactory(make)
    assert not list(tmp_path.iterdir())


# What it takes


_PEAK = """
import re, sys
from pathlib import Path
import support
import test_merge
from adaptax.merge import save_merged
from adaptax.models import find_architecture

def merge(target, base, kibibytes):
    arch = find_architecture(support.model_config(base))
    spec = support.full_spec(arch, rank=4)
    adapters = test_merge.exact_adapters(arch, spec)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = kibibytes("VmRSS")
    save_merged(target, base, adapters, spec, support.FAMILY, arch)
    return kibibytes("VmHWM") - before

read = lambda name: int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
base, merged = map(Path, sys.argv[1:])
merge(merged / "warm", test_merge.GOLDEN / "text", read)
print(merge(merged / "large", base, read))
"""


def write_large(folder: Path) -> int:
    """A checkpoint of 300 MB, half of it an embedding, half of it matrices of 12 MB; its bytes."""
    folder.mkdir()
    config = json.loads((GOLDEN / "text" / "config.json").read_text())
    config |= {"hidden_size": 640, "intermediate_size": 10_240, "num_hidden_layers": 4, "vocab_size": 120_000}
    config["layer_types"] = ["full_attention"] * 4
    (folder / "config.json").write_text(json.dumps(config))
    arch = find_architecture(support.model_config(folder))
    shapes = support.FAMILY.checkpoint.tensor_shapes(arch, "model.")
    save_file({name: np.ones(shape, BF16) for name, shape in shapes.items()}, folder / "model.safetensors")
    return (folder / "model.safetensors").stat().st_size


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux")
def test_host_memory_holds_a_few_pieces_however_large_the_checkpoint(tmp_path: Path) -> None:
    size = write_large(tmp_path / "base")
    assert size > 300_000_000
    root = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{root}:{root.parent / 'src'}"}
    command = [sys.executable, "-c", _PEAK, tmp_path / "base", tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) << 10 <= 64 << 20


def test_long_work_says_how_far_it_is(tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setattr("adaptax.new_folder.SECONDS_BETWEEN_LINES", 0.0)
    with caplog.at_level(logging.INFO, "adaptax"):
        merge(tmp_path / "merged", GOLDEN / "text")
    assert caplog.messages[0] == f"merging 56 modules into {tmp_path / 'merged'}, {269_600 / 2**30:.3g} GiB"
    for verb in ("merged", "checked"):
        lines = [line for line in caplog.messages if line.startswith(verb)]
        assert lines[-1].startswith(f"{verb} 0.0 of 0.0 GiB, ")
        assert lines[-1].endswith(" MiB/s, 0:00 left")
