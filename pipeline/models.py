"""`mario models`: the registered versions with their results; who was champion when, and why."""

import json
from typing import Any

from pipeline.registry import CHAMPION, Registry, day


def listed(as_json: bool) -> str:
    """A line a version, or JSON."""
    registry = Registry()
    versions, champion, aliases = registry.versions(), registry.champion(), registry.aliases()
    rows = [_row(version, champion, aliases) for version in versions]
    if as_json:
        return json.dumps(rows, indent=1)
    if not rows:
        return "no model is registered yet; train one (dvc repro)"
    head = ("version", "registered", "profile", "sampled clear rate", "return", "gate", "alias")
    lines = ["{:<8} {:<16}  {:<13} {:<19} {:>7}  {:<6} {}".format(*head)]
    for row in rows:
        alias = ", ".join(row["aliases"])
        lines.append(
            f"{row['version']:<8} {row['registered']:<16}  {row['profile'] or '-':<13} {_rate(row):<19} "
            f"{_number(row['return']):>7}  {row['gate'] or '-':<6} {alias}".rstrip()
        )
    if aliases.get(CHAMPION) not in (None, champion):
        lines.append(
            f"the alias {CHAMPION} was set to version {aliases[CHAMPION]} by hand; the log says {champion}, "
            "and the next promotion or rollback puts it back"
        )
    return "\n".join(lines)


def history(as_json: bool) -> str:
    """Who was champion from when on and why, and the verdicts that changed nothing."""
    registry = Registry()
    terms, verdicts = registry.terms(), registry.verdicts()
    by_run = {term.verdict_run: term for term in terms}
    keys = ("at", "version", "kind", "by", "reason")
    rows = [{key: getattr(term, key) for key in keys} for term in terms]
    refused = [
        {
            "at": day(run.info.start_time),
            "version": run.data.tags.get("version", ""),
            "verdict": run.data.tags.get("verdict", "not finished"),
            "champion": run.data.tags.get("champion"),
            "run": run.info.run_id,
        }
        for run in verdicts
        if run.info.run_id not in by_run
    ]
    if as_json:
        return json.dumps({"champions": rows, "refused": refused}, indent=1)
    if not rows and not refused:
        return "nobody was promoted yet (mario promote)"
    lines = ["champions, the newest first"] if rows else ["nobody is champion yet"]
    for row in reversed(rows):
        since = row["at"][:16].replace("T", " ")
        lines.append(f"  {since}  version {row['version']:<4} {row['kind']} by {row['by']}: {row['reason']}")
    if refused:
        lines.append("not promoted, the newest first")
    for row in reversed(refused):
        against = f"against version {row['champion']}" if row["champion"] != "none" else "without a champion"
        lines.append(f"  {row['at']}  version {row['version']:<4} {row['verdict']} {against} (run {row['run']})")
    return "\n".join(lines)


def _row(version: Any, champion: str | None, aliases: dict[str, str]) -> dict[str, Any]:
    tags, number = version.tags, str(version.version)
    named = [alias for alias, at in aliases.items() if at == number and alias != CHAMPION]
    return {
        "version": number,
        "registered": day(version.creation_timestamp),
        "profile": tags.get("profile"),
        "clear_rate": _float(tags.get("sampled.clear_rate")),
        "clear_rate_low": _float(tags.get("sampled.clear_rate_low")),
        "clear_rate_high": _float(tags.get("sampled.clear_rate_high")),
        "return": _float(tags.get("sampled.return_mean")),
        "frames": _float(tags.get("checkpoint.frames")),
        "commit": tags.get("trained.commit"),
        "gate": tags.get("gate.verdict"),
        "gate_reasons": tags.get("gate.reasons"),
        "aliases": [*([CHAMPION] if number == champion else []), *named],
    }


def _rate(row: dict[str, Any]) -> str:
    if row["clear_rate"] is None:
        return "-"
    interval = (row["clear_rate_low"], row["clear_rate_high"])
    shown = "" if None in interval else f" [{interval[0]:.0%}, {interval[1]:.0%}]"
    return f"{row['clear_rate']:.0%}{shown}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _float(text: str | None) -> float | None:
    return None if text in (None, "None") else float(text)
