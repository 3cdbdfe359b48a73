"""Singular values of adapters, and adapters of a lower rank."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import disks
import small_runs
import support
from adaptax import assess
from adaptax.config import Config, UserError
from adaptax.export import save_peft_adapter
from adaptax.lora import LoraSpec, adapter_shapes
from adaptax.models import Architecture, find_architecture
from adaptax.models.gemma3_weights import SIZES
from adaptax.options import DEFAULTS, EvaluateOptions, InspectOptions
from adaptax.spectrum import Inspection, Spectrum, advise, decompose, draw_blocks, inspect, measure_spectra, truncate
from command_line import Answer

Arrays = dict[str, np.ndarray]
ARCH = replace(SIZES["tiny"], embed_dim=24, mlp_dim=40, num_heads=2, head_dim=6)
LAYERS = {"attn/q_einsum": (0,), "attn/kv_einsum": (0,), "mlp/down_proj": (0,)}


def draw_adapters(arch: Architecture, spec: LoraSpec, seed: int = 0) -> Arrays:
    """Random ones, zero beyond the ranks of their modules."""
    rng = np.random.default_rng(seed)
    shapes = {path: shape for path, (shape, _) in adapter_shapes(support.FAMILY, arch, spec).items()}
    drawn = {path: 0.1 * rng.standard_normal(shape, np.float32) for path, shape in shapes.items()}
    return {path: np.where(support.beyond_ranks(spec, path), np.float32(0), a) for path, a in drawn.items()}


def updates_of(arrays: Mapping[str, np.ndarray], spec: LoraSpec) -> dict[tuple[str, int], np.ndarray]:
    """(kind, layer) -> the whole matrix that is added to a module, in float64."""
    updates = {}
    for kind, layers in spec.layers.items():
        a, b = (arrays[f"layers/{kind}/w_lora_{half}"].astype(np.float64) for half in "ab")
        for place, layer in enumerate(layers):
            updates[kind, layer] = spec.scale_of(kind, layer) * a[place] @ b[place]
    return updates


@pytest.mark.parametrize(("num_in", "num_out", "rank"), [(40, 30, 5), (64, 7, 2), (3, 50, 8), (50, 3, 8)])
def test_singular_values_are_those_of_the_whole_matrix(num_in: int, num_out: int, rank: int) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((num_in, rank), np.float32), rng.standard_normal((rank, num_out), np.float32)
    update = 0.3 * a.astype(np.float64) @ b
    u, values, vt = decompose(a, b, 0.3)
    assert len(values) == min(num_in, num_out, rank)
    np.testing.assert_allclose(values, np.linalg.svd(update, compute_uv=False)[: len(values)], rtol=1e-12)
    np.testing.assert_allclose(u * values @ vt, update, atol=1e-12)


def test_every_module_has_its_own_rank_scale_and_values() -> None:
    """Keys and values are one module."""
    spec = support.mixed_spec(ARCH)
    arrays = draw_adapters(ARCH, spec)
    updates = updates_of(arrays, spec)
    spectra = {(s.kind, s.layer): s for s in measure_spectra(arrays, spec)}
    assert set(spectra) == set(updates)
    for (kind, layer), spectrum in spectra.items():
        update = updates[kind, layer]
        assert len(spectrum.values) == spec.rank_of(kind, layer)
        expected = np.linalg.svd(update, compute_uv=False)[: len(spectrum.values)]
        np.testing.assert_allclose(spectrum.values, expected, rtol=1e-10)
        np.testing.assert_allclose(spectrum.norm, np.linalg.norm(update), rtol=1e-10)


@pytest.mark.parametrize(
    ("values", "energy", "rank"),
    [
        ([3, 2, 1, 0], 0.64, 1),  # squares 9, 4, 1 of 14
        ([3, 2, 1, 0], 0.65, 2),
        ([3, 2, 1, 0], 0.93, 3),
        ([3, 2, 1, 0], 1.0, 3),
        ([0.1] * 10, 0.3, 3),
        ([0.1] * 10, 1.0, 10),
        ([5], 0.99, 1),
        ([0, 0], 0.99, 0),
    ],
)
def test_the_rank_that_holds_a_share_of_the_energy(values: list[float], energy: float, rank: int) -> None:
    assert Spectrum("mlp/up_proj", 0, np.array(values, float)).rank_for(energy) == rank


def spectra_of(*values: list[float]) -> list[Spectrum]:
    return [Spectrum("mlp/up_proj", layer, np.array(row, float)) for layer, row in enumerate(values)]


@pytest.mark.parametrize(
    ("values", "blocks"),
    [
        ([[8, 4, 1, 0.5]], "█▄▁▁"),
        ([[2, 1, 0, 0]], "█▄  "),
        ([[4, 4], [400, 0]], "█▄"),  # a layer counts by its shape, not by its size
        ([[0, 0], [3, 3]], "██"),
        ([[1], [1, 1]], "█▄"),
        ([[1.0] * 64], "█" * 16),
        ([[0, 0]], ""),
    ],
)
def test_a_spectrum_in_blocks(values: list[list[float]], blocks: str) -> None:
    assert draw_blocks(spectra_of(*values)) == blocks


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([[9, 1, 0.1, 0.1], [9, 0, 0, 0]], "rank 2 holds 99% of the energy in every module; this adapter has 4"),
        ([[1, 1, 1, 1], [9, 0, 0, 0]], "takes the whole rank in 1 of 2 modules"),
        ([[0, 0], [0, 0]], "nothing learned"),
        ([[9, 0], [0, 0]], "rank 1 holds 99% of the energy in every module; this adapter has 2; B is zero in 1 of 2"),
    ],
)
def test_the_advice(values: list[list[float]], words: str) -> None:
    assert words in advise(spectra_of(*values), 0.99)


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_truncated_updates_are_the_best_there_are_at_their_rank(rank: int) -> None:
    spec = support.mixed_spec(ARCH)
    arrays = draw_adapters(ARCH, spec)
    made, made_spec = truncate(arrays, spec, rank)
    assert (made_spec.rank, made_spec.alpha, made_spec.ranks, made_spec.use_rslora) == (rank, float(rank), {}, False)
    truncated = updates_of(made, made_spec)
    for module, update in updates_of(arrays, spec).items():
        u, values, vt = np.linalg.svd(update, full_matrices=False)
        values[rank:] = 0
        np.testing.assert_allclose(truncated[module], u * values @ vt, atol=1e-6)
    assert {a.dtype for a in made.values()} == {np.dtype(np.float32)}


def test_the_whole_rank_gives_the_same_logits() -> None:
    arch, mesh = replace(ARCH, num_layers=1), support.make_mesh()
    ranks, alphas = {"layers/0/attn/q_einsum": 2}, {"layers/0/mlp/down_proj": 9.0}
    spec = LoraSpec(LAYERS, 5, 6.0, use_rslora=True, ranks=ranks, alphas=alphas)
    arrays, base = draw_adapters(arch, spec), support.load(None, arch, mesh)
    tokens = np.random.default_rng(0).integers(110, 2000, (2, 12))
    made, made_spec = truncate(arrays, spec, 5)
    ours, truncated = (
        support.logits(support.make_program(arch, s, mesh, train=False), base, adapters, tokens)
        for s, adapters in ((spec, arrays), (made_spec, made))
    )
    np.testing.assert_allclose(truncated, ours, atol=1e-5)


# The command


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder with a run, whose adapter is random, of rank 4."""
    home = small_runs.write_home(tmp_path_factory.mktemp("spectrum") / "home")
    run = small_runs.write_run(home / "run", small_runs.make_config(home))
    write_adapter(run.adapter, home)
    return run.adapter


def write_adapter(directory: Path, home: Path, factor: float = 3.0) -> None:
    """A random adapter for the model of a user's folder; with the factor 0, one that has learned nothing."""
    arch = find_architecture(support.model_config(home / "model"))
    spec = LoraSpec(LAYERS, 4, 8.0)
    arrays = {p: a * (factor if p.endswith("_b") else 1) for p, a in draw_adapters(arch, spec).items()}
    save_peft_adapter(directory, arrays, spec, support.FAMILY, arch, str(home / "model"))


def home_of(place: Path) -> Path:
    return place.parents[1]


def run_inspect(config: Config, place: Path | None, **options: Any) -> Inspection:
    given = {name: None for name in ("run", "adapter", "plot", "rank", "out")} | {"energy": DEFAULTS["energy"]}
    return inspect(InspectOptions(**(given | options)), config, support.make_mesh(), place)


def test_the_table_needs_no_base_weights(place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    home = small_runs.write_home(tmp_path / "home")
    weights = home / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])  # such a file cannot be read
    with caplog.at_level(logging.INFO):
        found = run_inspect(small_runs.make_config(home), place, energy=0.5)
    assert [(s.kind, s.layer, len(s.values)) for s in found.spectra] == [(kind, 0, 4) for kind in LAYERS]
    assert not found.scores
    for words in (*LAYERS, "rank for 50%", "█", "rank 2 holds 50%"):
        assert words in caplog.text
    with pytest.raises(UserError, match="safetensors"):
        run_inspect(small_runs.make_config(home), place, rank=2, out=str(tmp_path / "out"))


def test_an_adapter_that_has_learned_nothing(place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_adapter(tmp_path / "adapter", home_of(place), factor=0.0)
    with caplog.at_level(logging.INFO):
        config = small_runs.make_config(home_of(place))
        run_inspect(config, tmp_path / "adapter", plot=str(tmp_path / "x.png"))
    assert "nothing learned: B is zero in every module" in caplog.text
    assert not (tmp_path / "x.png").exists()


def test_the_picture(place: Path, tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image")
    run_inspect(small_runs.make_config(home_of(place)), place, plot=str(tmp_path / "x.png"))
    pixels = image.imread(tmp_path / "x.png")[..., :3].reshape(-1, 3)
    colours = {tuple(colour) for colour in np.round(pixels * 255).astype(int)}
    assert {(31, 119, 180), (255, 127, 14), (44, 160, 44)} <= colours  # a line for each kind
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


def test_the_change_of_loss_is_the_difference_of_two_evaluations(place: Path, tmp_path: Path) -> None:
    config, out = small_runs.make_config(home_of(place)), tmp_path / "truncated"
    found = run_inspect(config, place, rank=1, out=str(out))
    before, after = found.scores
    assert [path.name for path in tmp_path.iterdir()] == ["truncated"]
    settings = json.loads((out / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["use_rslora"]) == (1, 1, False)

    options = EvaluateOptions(run=None, adapter=None, adapters=None, data=None, compare=None, out=None)
    evaluated = assess.evaluate(options, config, support.make_mesh(), [place, out])
    assert len(after.losses) == 6
    for ours, theirs in zip((before, after), evaluated, strict=True):
        np.testing.assert_array_equal(ours.losses, theirs.losses)
    change = after.summarize(before)["loss_change"]
    np.testing.assert_allclose(change, (after.losses - before.losses).sum() / after.counts.sum())
    assert abs(change) > 1e-3


def test_peft_loads_the_truncated_adapter_and_computes_the_same(place: Path, tmp_path: Path) -> None:
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    config, model = small_runs.make_config(home_of(place)), home_of(place) / "model"
    config = small_runs.change(config, {"data.eval": None})
    run_inspect(config, place, rank=4, out=str(tmp_path / "whole"))
    run_inspect(config, place, rank=2, out=str(tmp_path / "half"))
    tokens = np.random.default_rng(0).integers(110, 500, (2, 12))

    def logits_of(adapter: Path) -> np.ndarray:
        base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        adapted = peft.PeftModel.from_pretrained(base, adapter)
        with torch.no_grad():
            return adapted(torch.tensor(tokens)).logits.numpy()

    arch, base = support.open_checkpoint(model)
    arrays = {p: a * (3.0 if p.endswith("_b") else 1) for p, a in draw_adapters(arch, LoraSpec(LAYERS, 4, 8.0)).items()}
    made, spec = truncate(arrays, LoraSpec(LAYERS, 4, 8.0), 2)
    mesh = support.make_mesh()
    ours = support.logits(support.make_program(arch, spec, mesh, train=False), base, made, tokens)
    whole = logits_of(place)
    np.testing.assert_allclose(logits_of(tmp_path / "whole"), whole, atol=1e-5)
    np.testing.assert_allclose(logits_of(tmp_path / "half"), ours, atol=1e-4)
    assert np.abs(ours - whole).max() > 1e-2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data.eval": None}, "no rows are held out (data.eval, data.eval_fraction)"),
        ({"data.eval": None, "data.train": None}, "no rows to evaluate on"),
        ({"data.eval": None, "data.train": "gone.jsonl", "data.eval_fraction": 0.5}, "gone.jsonl"),
    ],
    ids=["nothing held out", "no data", "data that are gone"],
)
def test_without_rows_it_is_written_and_not_measured(
    place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, changes: dict[str, Any], words: str
) -> None:
    config = small_runs.change(small_runs.make_config(home_of(place)), changes)
    found = run_inspect(config, place, rank=2, out=str(tmp_path / "out"))
    assert not found.scores
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    (line,) = [record.getMessage() for record in caplog.records if "not measured" in record.getMessage()]
    assert words in line
    assert line.endswith("data.eval=FILE gives it rows")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 2}, "rank=K and out=DIR go together"),
        ({"out": "x"}, "rank=K and out=DIR go together"),
        ({"rank": 5, "out": "x"}, "rank=5: .* has rank 4"),
        ({"rank": 2, "out": "there"}, "there exists: choose another name"),
        ({"rank": 2, "out": "there/file.png/x"}, "out=.*file.png/x cannot be written: Not a directory"),
        ({"plot": "there/file.png"}, "plot=there/file.png is there already"),
        ({"plot": "missing/x.png"}, "plot=missing/x.png: the folder missing is not there"),
        ({"plot": "x.svg"}, "plot=x.svg: the picture is a PNG file"),
    ],
)
def test_what_cannot_be_done_is_told_in_a_line(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file.png").write_text("mine")
    with pytest.raises(UserError, match=words) as raised:
        run_inspect(small_runs.make_config(home_of(place)), place, **options)
    assert "\n" not in str(raised.value)
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["there", "there/file.png"]
    assert (tmp_path / "there" / "file.png").read_text() == "mine"


def test_rows_that_were_asked_for_must_be_there(place: Path, tmp_path: Path) -> None:
    config = small_runs.change(small_runs.make_config(home_of(place)), {"data.eval": "gone.jsonl"})
    with pytest.raises(UserError, match=r"gone\.jsonl"):
        run_inspect(config, place, rank=2, out=str(tmp_path / "out"))
    assert not list(tmp_path.iterdir())


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 KiB."""
    yield from disks.mount_or_skip(tmp_path / "disk", 4)


def test_a_disk_that_is_full_leaves_nothing(place: Path, disk: Path) -> None:
    with pytest.raises(UserError, match="out=.* No space left"):
        run_inspect(small_runs.make_config(home_of(place)), place, rank=4, out=str(disk / "out"))
    assert not list(disk.iterdir())


def test_an_adapter_must_be_named_and_be_finite(place: Path, tmp_path: Path) -> None:
    config, spec = small_runs.make_config(home_of(place)), support.mixed_spec(ARCH)
    with pytest.raises(UserError, match="set run=DIR"):
        run_inspect(config, None)
    arrays = draw_adapters(ARCH, spec)
    arrays["layers/attn/kv_einsum/w_lora_b"][1, 0, 0] = np.nan
    with pytest.raises(UserError, match="layers/5/attn/kv_einsum: .* not finite"):
        measure_spectra(arrays, spec)


def test_the_command_line(place: Path, run: Callable[..., Answer], home: Path) -> None:
    answer = run("inspect", str(place.parent), f"plot={home / 'x.png'}", "rank=2", f"out={home / 'small'}")
    assert answer.code == 0, answer.err
    for words in ("mlp/down_proj", "this adapter has 4", "loss change", "truncated to rank 2"):
        assert words in answer.err
    assert (home / "x.png").read_bytes().startswith(b"\x89PNG")
    assert (home / "small" / "adapter_config.json").is_file()
    refused = run("inspect", str(place.parent), "energy=1.5")
    assert (refused.code, refused.err) == (1, "error: energy must be at most 1, not 1.5\n")
