"""``adaptax inspect``: how much of its rank an adapter uses, and what is lost at a lower one."""

from __future__ import annotations

import io
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jax.sharding import Mesh
from rich.table import Table
from rich.text import Text

from adaptax.assess import Scores, find_rows, score_rows, show
from adaptax.config import Config, UserError
from adaptax.data.pipeline import Dataset
from adaptax.export import save_peft_adapter
from adaptax.lora import LoraSpec
from adaptax.models.hub import SMALL_FILES, fetch_files
from adaptax.new_folder import check_place, open_new
from adaptax.options import InspectOptions
from adaptax.report import log_table
from adaptax.subject import Adapter, Subject, check_new_file, open_subject, read_adapter

log = logging.getLogger(__name__)
BLOCKS = "▁▂▃▄▅▆▇█"
NUM_BLOCKS = 16  # of a drawn spectrum; higher ranks share them
NOTHING = 1e-3  # of the largest singular value: below it no block is drawn
PLOTTED_DECADES = 6


@dataclass(frozen=True)
class Spectrum:
    """The singular values of a module's update, scale * A B, the largest first, as many as its rank."""

    kind: str
    layer: int
    values: np.ndarray

    @property
    def norm(self) -> float:
        """The update's Frobenius norm."""
        return float(np.sqrt(np.square(self.values).sum()))

    def rank_for(self, energy: float) -> int:
        """The lowest rank that holds a share of the energy, the sum of the squares; 0 where the update is zero."""
        held = np.cumsum(np.square(self.values))
        if held[-1] == 0:
            return 0
        needed = energy * held[-1] * (1 - 1e-12)  # sums are rounded
        return int(np.searchsorted(held, needed)) + 1


@dataclass(frozen=True)
class Inspection:
    """What was found."""

    spectra: list[Spectrum]
    scores: list[Scores] = field(default_factory=list)  # of the adapter, and of the truncated one


def inspect(options: InspectOptions, config: Config, mesh: Mesh, place: Path | None) -> Inspection:
    """Shows the singular values of an adapter; draws them, and truncates it, where the options ask for that.

    Args:
      options: of the command.
      config: names the base, and the rows that a truncated adapter is measured on.
      mesh: the devices.
      place: of the adapter.

    Raises:
      UserError: there is no adapter, it has no such rank, or what is to be written is there already.
    """
    plot, out = check_options(options, place)
    subject = open_subject(config, mesh, [place])
    adapter = subject.adapters[0]
    spec = adapter.job.spec
    highest = max(map(spec.stacked_rank, spec.layers))
    if options.rank is not None and options.rank > highest:
        raise UserError(f"rank={options.rank}: {adapter.name} has rank {highest}, and is truncated to that or less")
    spectra = measure_spectra(adapter.arrays, spec)
    show_spectra(spectra, options.energy, adapter.name)
    if plot is not None:
        plot_spectra(spectra, plot)
    if out is None or options.rank is None:
        return Inspection(spectra)
    return Inspection(spectra, truncate_and_measure(options, config, subject, options.rank, out))


def check_options(options: InspectOptions, place: Path | None) -> tuple[Path | None, Path | None]:
    """(the picture, the folder to write), both with a name that is free."""
    if place is None:
        raise UserError("no adapter to look at: set run=DIR of a run that has saved one, or adapter=DIR")
    if (options.rank is None) != (options.out is None):
        raise UserError("rank=K and out=DIR go together: the adapter truncated to that rank, and where it is written")
    plot = None if options.plot is None else check_new_file(options.plot, "plot")
    if plot is not None and plot.suffix.lower() != ".png":
        raise UserError(f"plot={plot}: the picture is a PNG file: give it a name that ends in .png")
    out = None if options.out is None else Path(options.out).expanduser()
    if out is not None:
        check_place(out, 0)
    return plot, out


# The numbers


def decompose(a_IR: np.ndarray, b_RO: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The singular value decomposition of scale * A B, without making that matrix.

    Args:
      a_IR: A of a module.
      b_RO: B of it.
      scale: of its update.

    Returns:
      U [in, R], the singular values [R] and V^T [R, out], in float64; fewer than R where in or out is less.
    """
    left, a_RR = np.linalg.qr(a_IR.astype(np.float64))
    right, b_RR = np.linalg.qr(b_RO.T.astype(np.float64))
    u, values, vt = np.linalg.svd(scale * a_RR @ b_RR.T, full_matrices=False)
    return left @ u, values, vt @ right.T


def measure_spectra(arrays: Mapping[str, np.ndarray], spec: LoraSpec) -> list[Spectrum]:
    """The singular values of every module.

    Args:
      arrays: path -> stacked float32 array, on the host.
      spec: what they were trained with.

    Raises:
      UserError: an array holds what is not finite.
    """
    spectra = []
    for kind, layers in spec.layers.items():
        for place, layer in enumerate(layers):
            a_IR, b_RO = (arrays[f"layers/{kind}/w_lora_{half}"][place] for half in "ab")
            if not (np.isfinite(a_IR).all() and np.isfinite(b_RO).all()):
                raise UserError(f"layers/{layer}/{kind}: its adapter holds numbers that are not finite; take another")
            _, found, _ = decompose(a_IR, b_RO, spec.scale_of(kind, layer))
            values = np.zeros(spec.rank_of(kind, layer))
            num = min(len(values), len(found))
            values[:num] = found[:num]
            spectra.append(Spectrum(kind, layer, values))
    return spectra


def truncate(arrays: Mapping[str, np.ndarray], spec: LoraSpec, rank: int) -> tuple[dict[str, np.ndarray], LoraSpec]:
    """The best approximation of every update at a rank, with one rank and the scale 1 for all modules.

    A becomes U sqrt(S) and B sqrt(S) V^T, with zeros where a module's own rank is lower.

    Args:
      arrays: path -> stacked float32 array, on the host.
      spec: what they were trained with.
      rank: of the new ones.
    """
    made = {}
    for kind, layers in spec.layers.items():
        paths = [f"layers/{kind}/w_lora_{half}" for half in "ab"]
        a_LIR, b_LRO = (arrays[path] for path in paths)
        a = np.zeros((len(layers), a_LIR.shape[1], rank), np.float32)
        b = np.zeros((len(layers), rank, b_LRO.shape[2]), np.float32)
        for place, layer in enumerate(layers):
            u, values, vt = decompose(a_LIR[place], b_LRO[place], spec.scale_of(kind, layer))
            roots = np.sqrt(values[:rank])
            a[place, :, : len(roots)] = u[:, :rank] * roots
            b[place, : len(roots)] = roots[:, None] * vt[:rank]
        made |= zip(paths, (a, b), strict=True)
    return made, LoraSpec(spec.layers, rank, float(rank), spec.dropout)


# What is shown


def show_spectra(spectra: Sequence[Spectrum], energy: float, name: str) -> None:
    """The table, a row for each kind of module, and what follows from it."""
    table = Table(title=Text(f"updates of {name}: lowest / median / highest of the layers"))
    for column in ("module kind", "layers", "rank", "norm", f"rank for {_percent(energy)}", "singular values"):
        is_left = column in ("module kind", "singular values")
        table.add_column(column, justify="left" if is_left else "right", no_wrap=True)
    for kind, found in by_kind(spectra).items():
        ranks = sorted({len(spectrum.values) for spectrum in found})
        span = " to ".join(dict.fromkeys(map(str, (ranks[0], ranks[-1]))))
        norms = _three([spectrum.norm for spectrum in found])
        held = _three([spectrum.rank_for(energy) for spectrum in found])
        drawn = draw_blocks(found) or "nothing learned"
        table.add_row(kind, str(len(found)), span, norms, held, Text(drawn))
    log_table(table)
    log.info("%s", advise(spectra, energy))


def by_kind(spectra: Sequence[Spectrum]) -> dict[str, list[Spectrum]]:
    """Module kind -> its spectra."""
    kinds: dict[str, list[Spectrum]] = {}
    for spectrum in spectra:
        kinds.setdefault(spectrum.kind, []).append(spectrum)
    return kinds


def draw_blocks(spectra: Sequence[Spectrum]) -> str:
    """Singular values as blocks, each layer's relative to its largest, the mean over layers that have learned."""
    rank = max(len(spectrum.values) for spectrum in spectra)
    learned = [spectrum.values / spectrum.values[0] for spectrum in spectra if spectrum.values[0] > 0]
    if not learned:
        return ""
    mean = sum(np.pad(values, (0, rank - len(values))) for values in learned) / len(learned)
    shares = [part.mean() for part in np.array_split(mean, min(rank, NUM_BLOCKS))]
    return "".join(
        BLOCKS[int(np.ceil(share / shares[0] * len(BLOCKS))) - 1] if share > NOTHING else " " for share in shares
    )


def advise(spectra: Sequence[Spectrum], energy: float) -> str:
    """What the ranks say, in a line."""
    learned = [spectrum for spectrum in spectra if spectrum.values[0] > 0]
    if not learned:
        return "nothing learned: B is zero in every module"
    held = [spectrum.rank_for(energy) for spectrum in learned]
    highest, has = max(held), max(len(spectrum.values) for spectrum in spectra)
    num_full = sum(rank == len(spectrum.values) for rank, spectrum in zip(held, learned, strict=True))
    words = f"; B is zero in {len(spectra) - len(learned)} of {len(spectra)}" * (len(learned) < len(spectra))
    if num_full and has > 1:
        return (
            f"{_percent(energy)} of the energy takes the whole rank in {num_full} of {len(spectra)} modules "
            f"(median {np.median(held):g}, this adapter has {has}): a higher model.lora_rank may learn more{words}"
        )
    return f"rank {highest} holds {_percent(energy)} of the energy in every module; this adapter has {has}{words}"


def _percent(share: float) -> str:
    return f"{100 * share:.6g}%"


def _three(numbers: Sequence[float]) -> str:
    """Lowest, median and highest; one where they are the same."""
    texts = [f"{number:.3g}" for number in (min(numbers), np.median(numbers), max(numbers))]
    return texts[0] if len(set(texts)) == 1 else " / ".join(texts)


def plot_spectra(spectra: Sequence[Spectrum], path: Path) -> None:
    """A picture: singular values by rank, the median over a kind's layers in a band from the lowest to the highest.

    Raises:
      UserError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    top = max(spectrum.values[0] for spectrum in spectra)
    if top == 0:
        log.warning("plot=%s: nothing was learned, so nothing is drawn", path)
        return
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for kind, found in by_kind(spectra).items():
        rank = max(len(spectrum.values) for spectrum in found)
        values = np.stack([np.pad(s.values, (0, rank - len(s.values)), constant_values=np.nan) for s in found])
        values = np.maximum(values, top * 10.0 ** -(PLOTTED_DECADES + 1))  # zeros lie below the picture
        ranks = np.arange(1, rank + 1)
        (line,) = axes.plot(ranks, np.nanmedian(values, axis=0), ".-", label=kind)
        bounds = np.nanmin(values, axis=0), np.nanmax(values, axis=0)
        axes.fill_between(ranks, *bounds, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set(xlabel="rank", ylabel="singular value of the update", yscale="log")
    axes.set_ylim(bottom=max(axes.get_ylim()[0], top * 10.0**-PLOTTED_DECADES))
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=120, format="png")
    with open_new(path) as file:
        file.write(drawn.getvalue())
    log.info("drawn in %s", path)


# A lower rank


def truncate_and_measure(
    options: InspectOptions, config: Config, subject: Subject, rank: int, out: Path
) -> list[Scores]:
    """Writes the truncated adapter; where there are rows, tells the loss with the adapter and with what was written.

    Returns:
      The scores of the two; none where there are no rows.
    """
    adapter = subject.adapters[0]
    data, reason = find_rows_at_hand(options, config, subject)
    write_truncated(adapter, rank, out)
    if data is None:
        log.warning("the change of loss is not measured: %s; data.eval=FILE gives it rows", reason)
        return []
    truncated = read_adapter(adapter.job, out, fetch_files(subject.job.source, SMALL_FILES))
    base = subject.load_base()
    scores = [score_rows(each, base, data, config) for each in (adapter, truncated)]
    summaries = [scores[0].summarize(None), scores[1].summarize(scores[0])]
    show(summaries)
    return scores


def find_rows_at_hand(options: InspectOptions, config: Config, subject: Subject) -> tuple[Dataset | None, str]:
    """(the rows that ``adaptax evaluate`` would take, or None; why there are none).

    Raises:
      UserError: data.eval names what cannot be read.
    """
    try:
        return find_rows(options, config, subject.tokenizer), ""
    except UserError as error:
        if config.data.eval is not None:
            raise
        return None, str(error)


def write_truncated(adapter: Adapter, rank: int, out: Path) -> None:
    """Writes it in PEFT's format, whole or not at all.

    Raises:
      UserError: in place of an OSError, naming the folder.
    """
    job = adapter.job
    arrays, spec = truncate(adapter.arrays, job.spec, rank)
    try:
        save_peft_adapter(out, arrays, spec, job.family, job.arch, job.source)
    except BaseException as error:
        shutil.rmtree(out.with_name(out.name + ".partial"), ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(f"out={out} cannot be written: {error.strerror}") from None
        raise
    log.info("truncated to rank %d in %s", rank, out)
