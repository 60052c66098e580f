"""A benchmark's result as Markdown tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dtvla.analysis.tables import markdown_table

TOTAL = "total"  # as in dtvla.benchmarks.timing, which needs torch
MS = 1000.0
GB = 1e9


def tables(document: Mapping[str, Any]) -> str:
    """The numbers of any study."""
    kinds = {"rollout": _rollout, "parity": _parity, "memory": _needs, "training": _training, "grpo": _grpo}
    return kinds.get(document["study"], _decisions)(document)


def _decisions(document: Mapping[str, Any]) -> str:
    """Latency and throughput: times, ratios, targets, and whether both sides decided alike."""
    floor = document["floor"]
    rates = (
        f"{document['device']} {document['dtype']}, {document['threads']} threads; measured "
        f"{floor['bytes_per_s'] / 1e9:.4g} GB/s, {floor['flops_per_s'] / 1e12:.4g} TFLOP/s"
    )
    parts = [rates, _times(document), _ratios(document)]
    if document["targets"]:
        parts.append(_targets(document))
    return "\n\n".join([*parts, _agreement(document)])


def _times(document: Mapping[str, Any]) -> str:
    header = ["batch", "side", "ms", "quartiles", "read", "thought", "tokens/s", "act", "decisions/s"]
    header += ["tokens/forward", "floor ms", "x floor"]
    rows = []
    for record in document["measurements"]:
        phases, size = record["phases"], record["batch_size"]
        total = phases[TOTAL]
        floor = document["floor"]["seconds_by_batch_size"][str(size)].get(record["side"], {}).get(TOTAL)
        rows.append(
            [
                str(size),
                record["side"],
                _ms(total["median_s"]),
                f"{_ms(total['q1_s'])} - {_ms(total['q3_s'])}",
                *(_ms(phases[phase]["median_s"]) if phase in phases else "" for phase in ("read", "thought")),
                f"{record['thought_tokens'] / phases['thought']['median_s']:.4g}" if "thought" in phases else "",
                _ms(phases["act"]["median_s"]),
                f"{size / total['median_s']:.4g}",
                _per_forward(record),
                _ms(floor) if floor else "",
                f"{total['median_s'] / floor:.2f}" if floor else "",
            ]
        )
    return markdown_table(header, rows)


def _per_forward(record: Mapping[str, Any]) -> str:
    if "thought_forwards" not in record:
        return ""
    return f"{record['longest_thought'] / max(1, record['thought_forwards']):.2f}"


def _ratios(document: Mapping[str, Any]) -> str:
    return markdown_table(
        ["ratio of medians", "value"], [[name, f"{r['value']:.3g}"] for name, r in document["ratios"].items()]
    )


def _targets(document: Mapping[str, Any]) -> str:
    rows = []
    for target in document["targets"]:
        limit = f"at least {target['at_least']}" if "at_least" in target else f"at most {target['at_most']}"
        rows.append([target["ratio"], limit, f"{target['value']:.3g}", "met" if target["met"] else "missed"])
    return markdown_table(["target", "limit", "value", "verdict"], rows)


def _agreement(document: Mapping[str, Any]) -> str:
    found = document["agreement"]
    sizes = {str(document["settings"]["batch_size"]): found} if document["study"] == "latency" else found
    rows = [
        [rows, pair, f"{same['equal_thoughts']:.4g}" if "equal_thoughts" in same else ""]
        + [f"{same['equal_bins']:.4g}", f"{same['farthest_bins']:.0f}"]
        for rows, pairs in sizes.items()
        for pair, same in pairs.items()
    ]
    return markdown_table(["batch", "same decision?", "equal thoughts", "equal bins", "farthest bins"], rows)


def _ms(seconds: float) -> str:
    return f"{MS * seconds:.4g}"


def _rollout(document: Mapping[str, Any]) -> str:
    """Speed and memory by side, where memory goes, ratios, targets, and whether all sides came to the same end."""
    task, replay = document["task"], document["replay"]
    what = f"{task['suite']} task {task['task_id']}: {replay['steps']} steps of {replay['source']} actions"
    header = ["workers", "side", "steps/s", "per core", "CPU ms/step", "episodes/h", "start s", "PSS MiB", "as plain"]
    rows = [
        [str(m["workers"]), m["side"], *(f"{m[key]:.4g}" for key in ("steps_per_s", "steps_per_s_per_core"))]
        + [f"{m[key]:.4g}" for key in ("cpu_ms_per_step", "episodes_per_hour", "start_s")]
        + [f"{m['memory_mib']['pss']:.0f}"]
        + ["yes" if document["agreement"][f"{m['side']}, {m['workers']} workers"]["as_plain"] else "no"]
        for m in document["measurements"]
    ]
    parts = [what, markdown_table(header, rows), _memory(document["memory_stages"]), _ratios(document)]
    if document["targets"]:
        parts.append(_targets(document))
    return "\n\n".join(parts)


def _memory(found: Mapping[str, Any]) -> str:
    rows = [[stage, *(f"{value:.0f}" for value in parts.values())] for stage, parts in found["after"].items()]
    header = ["MiB of ours after", *next(iter(found["after"].values()))]
    sizes = ", ".join(f"{name} {size:.0f}" for name, size in found["model_mib"].items())
    return f"{markdown_table(header, rows)}\n\nThe compiled model, MiB: {sizes}"


def _parity(document: Mapping[str, Any]) -> str:
    header = ["task", "instruction", "actions", "steps", "success", "success equal", "states equal"]
    header += ["farthest", "observations equal"]
    rows = [
        [str(t["task_id"]), t["instruction"], t["source"], str(t["steps"]), _yes(t["success"])]
        + [_yes(t["equal_success"]), _yes(t["equal_states"] and t["equal_chunks"]), f"{t['farthest_state']:.3g}"]
        + [f"{_yes(t['equal_observations'])}, {t['observations']}"]
        for t in document["tasks"]
    ]
    return f"{markdown_table(header, rows)}\n\nequal in everything: {document['equal']} of {document['compared']}"


def _needs(document: Mapping[str, Any]) -> str:
    """Memory of a training step by model, method and micro-batch."""
    kinds = list(document["rows"][0]["peak_bytes"])
    header = ["model", "method", "micro-batch", "predicted GB", *kinds, f"FSDP {document['gpus']}"]
    measured = any("measured_bytes" in row for row in document["rows"])
    rows = []
    for row in document["rows"]:
        predicted, peak = sum(row["peak_bytes"].values()), row["peak_bytes"]
        cells = [row["model"], row["method"], str(row["micro_batch"]), *map(_gb, (predicted, *peak.values()))]
        cells.append(_gb(row["sharded_bytes"]))
        if measured:
            found = row.get("measured_bytes")
            cells += [_gb(found), f"{found / predicted:.3f}" if found else ""]
        rows.append(cells)
    lengths = {
        row["model"]: f"{(row['parameters'] - row['adapter']) / 1e6:.4g} M, {row['sequence']} tokens"
        for row in document["rows"]
    }
    what = f"{document['precision']}; " + "; ".join(f"{model}: {size}" for model, size in lengths.items())
    return f"{what}\n\n{markdown_table(header + ['measured GB', 'measured / predicted'] * measured, rows)}"


def _gb(size: int | None) -> str:
    return "" if size is None else f"{size / GB:.3g}"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _training(document: Mapping[str, Any]) -> str:
    """Speed and activation memory of a training step, both ways."""
    header = ["side", "ms", "quartiles", "passes", "update", "samples/s", "tokens/s", "TFLOP/s"]
    header += ["share of peak", "activations GB"]
    rows = []
    for record in document["measurements"]:
        phases, share = record["phases"], record["share_of_peak"]
        total = phases[TOTAL]
        rows.append(
            [record["side"], _ms(total["median_s"]), f"{_ms(total['q1_s'])} - {_ms(total['q3_s'])}"]
            + [_ms(phases[phase]["median_s"]) for phase in ("passes", "update")]
            + [f"{record['samples_per_s']:.4g}", f"{record['tokens_per_s']:.4g}", f"{record['flops_per_s'] / 1e12:.4g}"]
            + ["" if share is None else f"{share:.3f}", f"{record['activation_bytes'] / GB:.3g}"]
        )
    found = document["agreement"]
    shapes = document["shapes"]
    passes, longest = len(shapes["row_tokens"]["plain"]), max(shapes["row_tokens"]["plain"])
    what = (
        f"{document['device']} {document['dtype']}, {document['threads']} threads; steps of {passes} passes of "
        f"{shapes['micro_batch']} rows of up to {longest} tokens"
    )
    same = (
        f"loss {found['plain_loss']:.7g} (plain) and {found['our_loss']:.7g} (ours); gradients "
        f"{found['gradients_apart']:.2g} of their length apart"
    )
    parts = [what, markdown_table(header, rows), _ratios(document)]
    return "\n\n".join([*parts, *([_targets(document)] if document["targets"] else []), same])


def _grpo(document: Mapping[str, Any]) -> str:
    """Seconds of an iteration by phase, what was decided in it, and whether both sides learn the same."""
    phases = ["start", "collect", "log-probs", "update", TOTAL]
    counts = ["episodes", "steps", "real_decisions", "dead_decisions"]
    rows = [
        [m["side"], *(f"{m['phases'][phase]['median_s']:.4g}" if phase in m["phases"] else "" for phase in phases)]
        + [" ".join(str(one[count]) for one in m["iterations"]) for count in counts]
        for m in document["measurements"]
    ]
    header = ["side", *(f"{phase} s" for phase in phases), *(count.replace("_", " ") for count in counts)]
    shapes, settings, found = document["shapes"], document["settings"], document["agreement"]
    what = (
        f"{document['device']} {document['dtype']}, {document['threads']} threads; {settings['groups']} groups of "
        f"{settings['group_size']}, horizon {settings['horizon']}, published rows of {shapes['padded_tokens']} tokens; "
        f"our {shapes['workers']} workers start once, in {document['start_once_s']:.3g} s with their first scenes"
    )
    same = (
        f"of {found['tokens']} tokens, log-probabilities of both at most {found['recorded_apart']:.2g} (as recorded) "
        f"and {found['computed_apart']:.2g} (computed anew) apart; gradients {found['gradients_apart']:.2g} of their "
        "length"
    )
    return "\n\n".join([what, markdown_table(header, rows), _ratios(document), _targets(document), same])
