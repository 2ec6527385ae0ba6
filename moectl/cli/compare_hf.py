"""``moectl compare-hf``: Hugging Face's model against ours, or yours, tensor by tensor, and which mistake it is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moectl.cli.boundary import Interrupted
from moectl.cli.output import UNWRAPPED, out

if TYPE_CHECKING:
    from moectl.parity.layer_only import LayerOnly
    from moectl.parity.results import Report

_NEW = "new-adapter"


def command(
    context: typer.Context,
    family: Annotated[
        str | None, typer.Argument(metavar="[FAMILY]", help="qwen3, mixtral, …; or new-adapter, to write a template")
    ] = None,
    path: Annotated[Path | None, typer.Argument(metavar="[PATH]", help="of new-adapter: the file to write")] = None,
    candidate: Annotated[
        str | None, typer.Option(metavar="SPEC", help="your code: package.module:Class or path.py:Class")
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="a file that says what cannot be guessed about the candidate")
    ] = None,
    level: Annotated[str | None, typer.Option(help="model, layer, moe, attention or router; default: all")] = None,
    probe: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="run this probe only; may be repeated")
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="float64, float32, bfloat16 or all; may be repeated")
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="tiny, published, a config.json, or a folder with config and weights")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="of random weights and inputs")] = 0,
    layer_only: Annotated[
        bool, typer.Option("--layer-only", help="one layer of the published size, in less than 8 GiB")
    ] = False,
    everything: Annotated[bool, typer.Option("--all", help="a line for every layer, dtype and component")] = False,
    list_: Annotated[bool, typer.Option("--list", help="what holds, by family and component; measured now")] = False,
    list_probes: Annotated[bool, typer.Option("--list-probes", help="every probe, and what it asks")] = False,
    json_: Annotated[bool, typer.Option("--json", help="one JSON document")] = False,
) -> None:
    """Compare with Hugging Face, tensor by tensor; where one differs, say which mistake it is.

    Without --candidate, moectl's own code is compared. Both sides get the same weights and inputs, in float64
    (to 1e-10), float32 (to 1e-5) and bfloat16 (to a few times the reference's own error).
    Exit code 0 only if everything held, 3 otherwise.
    """
    if list_probes:
        _list_probes(json_)
    elif list_:
        _list_families(json_)
    elif family is None:
        out().data(context.get_help())
    elif family == _NEW:
        _new_adapter(path, level, json_)
    elif layer_only:
        _compare_layer(family, config, seed, everything=everything, json_=json_)
    else:
        from moectl.parity.session import Request

        request = Request(
            family,
            config=config or "tiny",
            dtypes=tuple(dtype or ("all",)),
            probes=tuple(probe or ()),
            level=level,  # type: ignore[arg-type]
            seed=seed,
            candidate=candidate,
            adapter=adapter,
        )
        _compare(request, everything=everything, json_=json_)


def _compare(request: Any, *, everything: bool, json_: bool) -> None:
    from moectl.parity.session import compare_hf
    from moectl.reports.parity import parity_report

    try:
        with out().progress("comparing") as bar:
            report = compare_hf(request, progress=bar)
    except KeyboardInterrupt as error:
        raise Interrupted("interrupted: nothing was decided") from error
    if json_:
        out().data(report.to_json())
    else:
        out().render(parity_report(report, everything=everything), piped_width=UNWRAPPED)
    conclude(report)


def conclude(report: Report) -> None:
    """
    Raises:
        CheckError: not everything held.
    """
    from moectl.errors import CheckError

    if report.ok:
        return
    codes = [code for finding in getattr(report.diagnosis, "findings", ()) for code in finding.codes]
    faults = [problem for problem in report.problems if problem["fails"]]
    codes += [problem["code"] for problem in faults if problem["code"]]
    who = report.broken[0].candidate if report.broken else " and ".join(report.header["candidates"])
    where = f": {report.first[1].name} is the first tensor that does" if report.first is not None else ""
    said = f"{who} differs from Hugging Face's {report.family}{where}"
    if report.first is None:
        said = f"{who} could not be compared whole with Hugging Face's {report.family}"
    if not report.broken and faults:
        said = f"{who} gives Hugging Face's numbers within every bound, and has a fault: {faults[0]['title']}"
    hint = (
        f"Read about it: moectl explain {codes[0]}."
        if codes
        else "The rows that do not hold say where; --all shows more."
    )
    raise CheckError(said, hint)


def _compare_layer(family: str, config: str | None, seed: int, *, everything: bool, json_: bool) -> None:
    from moectl.errors import CheckError
    from moectl.parity.session import compare_layer

    with out().progress("comparing one layer"):
        source, outcome = compare_layer(family, config or "published", seed)
    if json_:
        out().data(_layer_document(family, source.text, outcome))
    else:
        from moectl.reports.parity import layer_report

        out().render(layer_report(family, source.text, outcome, everything=everything), piped_width=UNWRAPPED)
    if not outcome.ok:
        differing = [row.name for row in outcome.rows if row.ok is False]
        said = f"{differing[0]} differs" if differing else f"it took {outcome.peak_bytes / 2**30:.1f} GiB"
        raise CheckError(f"the layer of {family} does not hold: {said}", "The rows say where.")


def _layer_document(family: str, text: str, outcome: LayerOnly) -> dict[str, Any]:
    tensors = [{**vars(row), "ok": row.ok, "probe": "layer-only", "dtype": "float32"} for row in outcome.rows]
    return {
        "ok": outcome.ok,
        "family": family,
        "config": text,
        "peak_bytes": outcome.peak_bytes,
        "limit_bytes": outcome.limit_bytes,
        "seconds": outcome.seconds,
        "tensors": tensors,
        "diagnosis": [],
    }


def _list_families(json_: bool) -> None:
    from moectl.parity.overview import overview

    with out().progress("measuring"):
        cells = overview()
    if json_:
        out().data({"families": [cell._asdict() for cell in cells]})
        return
    rows = [
        (
            cell.family,
            cell.level,
            cell.candidate,
            {True: "holds", False: "DIFFERS", None: "–"}[cell.holds],
            cell.tensors or None,
            f"{cell.ratio:.1e}" if cell.holds is not None else None,
            cell.says or None,
        )
        for cell in cells
    ]
    caption = (
        "Measured now, on a tiny model of each family: Hugging Face against moectl's own layers, and against the plain "
        "formula that diagnosis uses; every tensor and gradient, in float64 to 1e-10."
    )
    columns = ("family", "level", "against", "verdict", "tensors", "error/tol", "why not")
    out().table("What holds", columns, rows, caption=caption)


def _list_probes(json_: bool) -> None:
    from moectl.parity.probes import PROBES
    from moectl.parity.tolerance import dtype_name

    listed = [
        {
            "name": probe.name,
            "asks": probe.summary,
            "levels": list(probe.levels),
            "dtypes": [dtype_name(dtype) for dtype in probe.dtypes],
        }
        for probe in PROBES.values()
    ]
    if json_:
        out().data({"probes": listed})
        return
    rows = [(each["name"], each["asks"], " ".join(each["dtypes"]), " ".join(each["levels"])) for each in listed]
    out().table(None, ("probe", "what it asks", "dtypes", "levels"), rows)


def _new_adapter(path: Path | None, level: str | None, json_: bool) -> None:
    from moectl.errors import unknown
    from moectl.parity.adapter import new_adapter
    from moectl.parity.probes.probe import EVERY_LEVEL

    if level is not None and level not in EVERY_LEVEL:
        raise unknown("level", level, EVERY_LEVEL)
    written = new_adapter(path or Path("adapter.py"), level or "moe")
    if json_:
        out().data({"path": str(written), "level": level or "moe"})
        return
    out().data(str(written))
    out().say(f"Fill it in, then: moectl compare-hf qwen3 --candidate your_file.py:YourClass --adapter {written}")
