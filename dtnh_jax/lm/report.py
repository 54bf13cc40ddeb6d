"""Writes `report.md`, tables and a figure from results."""

import json
import pathlib
from typing import Any

from rich.console import Console
from rich.table import Table

from dtnh_jax import plots
from dtnh_jax.finetune.files import write_json
from dtnh_jax.lm import paths
from dtnh_jax.lm.experiment import Experiment
from dtnh_jax.lm.methods import KL, LORA, METHODS, WISE_FT

_FIGURE = "forgetting.png"


def introduction(experiment: Experiment, path: pathlib.Path) -> list[str]:
    """Returns lines on the model, texts, sizes and licences of a run."""
    config, model = experiment.config, experiment.model
    rows = experiment.splits
    return [
        f"Model {model.name}: {model.licence}",
        *(
            f"{role.capitalize()} {source.name}: {source.licence}"
            for role, source in experiment.sources.items()
        ),
        f"Rows of {config.context} tokens: {len(rows.train.tokens)} to train on, "
        f"{len(rows.held_out.tokens)} held out, {len(rows.test.tokens)} of the target "
        f"and {len(rows.kept.tokens)} of what may be forgotten to test on",
        f"{len(config.methods)} methods x {config.seeds} seeds, {config.steps} "
        f"steps of {config.batch_size} rows; folder {path}",
    ]


def write(path: pathlib.Path, results: dict[str, Any]) -> None:
    """Writes the figure, the report, and then the results."""
    _figure(results).savefig(path / _FIGURE)
    (path / "report.md").write_text(markdown(results))
    write_json(path / "results.json", results)


def _figure(results: dict[str, Any]) -> Any:
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in results["rows"]:
        point = row["target_loss"]["mean"], row["kept_loss"]["mean"]
        curves.setdefault(row["method"], []).append(point)
    base = results["base"]["target_loss"], results["base"]["kept_loss"]
    return plots.forgetting(curves, base)


def losses(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Returns a table's header, and a row for every method at every strength."""
    header = ["method", "strength", "target loss", "kept loss", "forgotten"]
    header += ["KL target", "KL kept", f"vs {WISE_FT}", f"vs {KL} sum"]
    base = results["base"]
    first = ["base model", "", f"{base['target_loss']:.3f}", f"{base['kept_loss']:.3f}"]
    body = [first + [""] * (len(header) - len(first))]
    for row in results["rows"]:
        strength = "" if row["strength"] is None else f"{row['strength']:g}"
        line = [row["method"], strength]
        line += [_level(row[key]) for key in ("target_loss", "kept_loss")]
        line.append(_difference(row["forgotten"]))
        line += [_level(row[key]) for key in ("target_kl", "kept_kl")]
        line += [_difference(row[f"above_{curve}"]) for curve in (WISE_FT, KL)]
        body.append(line)
    return header, body


def at_shares(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Returns a table's header, and a row of forgetting at target losses per method."""
    header, body = ["method"], []
    for name, each in results["at_shares"].items():
        line = [name]
        for at in each:
            line.append(_difference(at["forgotten"]))
            line.append("" if at["kept_kl"] is None else _level(at["kept_kl"]))
        body.append(line)
        if len(header) == 1:
            for at in each:
                where = f"at {at['target_loss']['mean']:.3f}"
                header += [f"forgotten {where}", f"KL kept {where}"]
    return header, body


def costs(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Returns a table's header, and a row for every trained method."""
    header = ["method", "seconds a step", f"to {LORA}", f"to {KL} sum"]
    header += ["memory (MB)", f"to {LORA}", f"to {KL} sum"]
    body = []
    for name, cost in results["costs"].items():
        line = [name]
        for key, unit in (("step_seconds", 1.0), ("temporary_bytes", 1e6)):
            value = cost[key]
            line.append("" if value is None else f"{value / unit:.3g}")
            line += [_times(cost[f"{key}_to_{other}"]) for other in (LORA, KL)]
        body.append(line)
    return header, body


def _level(numbers: dict[str, float | None]) -> str:
    mean = f"{numbers['mean']:.3f}"
    return mean if numbers["std"] is None else f"{mean} ± {numbers['std']:.3f}"


def _difference(numbers: dict[str, float | None] | None) -> str:
    if numbers is None:
        return ""
    mean = f"{numbers['mean']:+.3f}"
    return mean if numbers["std"] is None else f"{mean} ± {numbers['std']:.3f}"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"


def notes(results: dict[str, Any]) -> list[str]:
    """Returns sentences that explain the numbers of the tables."""
    config, texts = results["config"], results["texts"]
    seeds = config["seeds"]
    names = dict.fromkeys(row["method"] for row in results["rows"])
    shares = ", ".join(f"{share:.0%}" for share in paths.SHARES)
    meanings = [f"{x}: {METHODS[x].meaning}" for x in names if METHODS[x].meaning]
    return [
        f"Losses and divergences in nats per token, means and standard deviations over "
        f"{seeds} seeds. Seeds differ in initial adapters and the order of texts."
        if seeds > 1
        else "Losses and divergences in nats per token. One seed: it says nothing of "
        "another.",
        f"Target: {texts['target']['name']}, {results['tokens']['test']} tokens that "
        f"none was trained on. Kept: {texts['kept']['name']}, "
        f"{results['tokens']['kept']} tokens. Forgotten: the kept loss minus the base "
        "model's.",
        f"vs {WISE_FT}, vs {KL} sum: the kept loss minus that method's at the same "
        "target loss; below 0 is better.",
        *(
            [
                f"At the same target loss: at {shares} of what plain adapters gain, on "
                "straight lines between the strengths of a method, of which plain "
                f"adapters are strength 0 (the base model is the end of {WISE_FT}'s). "
                "Empty where a method does not come there."
            ]
            if results["at_shares"]
            else []
        ),
        "Seconds of a step: the median. Memory: what the compiler allots to a step "
        "beside its arguments, which are weights, adapters and optimizer.",
        *([f"Strengths: {'; '.join(meanings)}."] if meanings else []),
        f"{results['trained_parameters']} trained parameters, {config['steps']} steps "
        f"of {config['batch_size']} rows of {config['context']} tokens, learning rate "
        f"{config['learning_rate']:g} ({config['schedule']}), {config['dtype']}.",
        *(
            f"{name}: {licence}"
            for name, licence in (
                (results["model"]["name"], results["model"]["licence"]),
                *((text["name"], text["licence"]) for text in texts.values()),
            )
        ),
    ]


def markdown(results: dict[str, Any]) -> str:
    """Returns the report."""
    machine = results["machine"]
    options = json.dumps(results["config"], indent=1)
    parts = [
        f"# {results['model']['name']} on {results['texts']['target']['name']}",
        _markdown_table(*losses(results)),
        *([_markdown_table(*at_shares(results))] if results["at_shares"] else []),
        _markdown_table(*costs(results)),
        *notes(results),
        f"Measured on {machine['date']}, {machine['device']} with "
        f"{machine['cpu_count']} cores, {machine['platform']}, Python "
        f"{machine['python']}, jax {machine['jax']}.",
        f"![What is learned, and what is forgotten]({_FIGURE})",
        f"## Options\n\n```json\n{options}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _markdown_table(header: list[str], body: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def show(console: Console, results: dict[str, Any], path: pathlib.Path) -> None:
    """Prints the tables."""
    for title, (header, body) in (
        ("Losses on texts that none was trained on", losses(results)),
        ("At the same target loss", at_shares(results)),
        ("What a training step costs", costs(results)),
    ):
        if not body:
            continue
        table = Table(title=title)
        for number, name in enumerate(header):
            table.add_column(name, no_wrap=number == 0)
        for line in body:
            table.add_row(*line)
        console.print(table)
    for note in notes(results):
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    console.print(
        f"Report: {path / 'report.md'}", markup=False, highlight=False, soft_wrap=True
    )
