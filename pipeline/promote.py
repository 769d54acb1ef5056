"""`mario promote` and `mario rollback`: who becomes champion, on what evidence, and the way back."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from pipeline import graph
from pipeline.errors import UserError
from pipeline.registry import CHALLENGER, MODEL, Registry, Term, now, standing

VERDICT = Path("reports/promotion.json")  # the last one, for the report


def promote(which: str = CHALLENGER, reason: str | None = None, force: bool = False, automatic: bool = False) -> int:
    """Makes a version champion if it is better than the present one.

    Args:
        which: version or alias
        force: whatever the numbers say; the artifact's hash must match all the same
        automatic: do nothing unless params.yaml says `promote.automatic: true`

    Returns:
        0: it is champion (or `automatic` is off); 1: it is not

    Raises:
        UserError: there is no such version, or it is champion already
    """
    if force and not (reason or "").strip():
        raise UserError('--force needs --reason "why": it is what the log will say')
    graph.load()
    registry = Registry()
    registry.settle()
    terms = registry.terms()  # read once: what is decided below holds only as long as this is the log
    challenger, champion = registry.version(which), registry.champion(terms)
    if champion == str(challenger.version):
        raise UserError(f"version {champion} is the champion already")
    found = evaluate(str(challenger.version), champion, automatic, force)
    if found is None:
        return 1
    if found["status"] == "OFF":
        print(f"not promoted: {found['reasons'][0]}")
        return 0
    verdict = {"at": now(), "version": str(challenger.version), "champion": champion, **found}
    if promoted := found["status"] == "PASS" or (force and found["status"] == "FAIL"):
        verdict["kind"] = "promotion" if found["status"] == "PASS" else "forced"
    if reason:
        verdict["reasons"] = [*verdict["reasons"], reason]
    run_id = verdict["run_id"] = registry.open_verdict(f"version {challenger.version}", _tags(verdict))
    if promoted:
        after, words = terms[-1].number if terms else 0, reason or verdict["reasons"][-1]
        if registry.appoint(challenger, after, verdict["kind"], words, run_id) is None:
            promoted = False
            verdict["status"] = "ERROR"
            verdict["reasons"] = [
                f"version {registry.champion()} became champion while this one was compared with "
                f"{'nobody' if champion is None else f'version {champion}'}; compare it with the new one: "
                f"mario promote {challenger.version}"
            ]
    _close(registry, challenger, verdict, promoted)
    if verdict["status"] == "ERROR":
        raise UserError(f"version {challenger.version} is not promoted: {'; '.join(verdict['reasons'])}")
    print(describe(verdict))
    return 0 if promoted else 1


def rollback(which: str | None = None, reason: str | None = None) -> int:
    """Makes the champion before the present one champion again, or the earlier one that is named.

    Raises:
        UserError: there is no earlier champion, or its files are not those that were registered
    """
    graph.load()
    registry = Registry()
    registry.settle()
    terms = registry.terms()
    if not terms:
        raise UserError("nobody was promoted yet, so there is nothing to go back to; mario promote VERSION")
    target = _earlier(registry, terms, which)
    words = reason or f"back from version {terms[-1].version}"
    verdict = {"at": now(), "version": target, "champion": terms[-1].version, "kind": "rollback", "test": None}
    try:
        version = registry.version(target)
    except UserError:
        raise UserError(
            f"version {target} was deleted from the registry; mario rollback VERSION goes to an older one "
            "(mario models --history)"
        ) from None
    told = _run_stage("verify", target)
    verdict |= {"status": "ERROR", "reasons": [told]} if told else {"status": "PASS", "reasons": [words]}
    run_id = verdict["run_id"] = registry.open_verdict(f"rollback to version {target}", _tags(verdict))
    done = not told and registry.appoint(version, terms[-1].number, "rollback", words, run_id) is not None
    if not told and not done:
        verdict |= {"status": "ERROR", "reasons": [f"version {registry.champion()} became champion just now"]}
    _close(registry, version, verdict, done)
    if not done:
        raise UserError(f"not rolled back to version {target}: {verdict['reasons'][0]}")
    print(f"version {target} is champion again; version {terms[-1].version} was ({words})")
    return 0


def _earlier(registry: Registry, terms: list[Term], which: str | None) -> str:
    if which is None:
        stack = standing(terms)
        if len(stack) < 2:
            raise UserError(f"version {terms[-1].version} is the first champion; there is none to go back to")
        return stack[-2].version
    earlier = list(dict.fromkeys(term.version for term in terms if term.version != terms[-1].version))
    if which not in earlier:
        raise UserError(f"version {which} was no champion before; these were: {', '.join(earlier) or 'none'}")
    return which


def evaluate(challenger: str, champion: str | None, automatic: bool, force: bool) -> dict[str, Any] | None:
    """What stages/compare.py finds out, in a process of its own; None if it failed and has told why."""
    with tempfile.TemporaryDirectory(prefix="mario-promote-") as folder:
        out = Path(folder) / "result.json"
        command = ["compare", challenger, *([champion] if champion else []), "--out", str(out)]
        command += [flag for flag, given in (("--automatic", automatic), ("--force", force)) if given]
        done = subprocess.run([sys.executable, "-m", "stages", *command])
        return json.loads(out.read_text()) if done.returncode == 0 else None


def _run_stage(*command: str) -> str:
    """What a script that failed says, in one line; nothing if it did not."""
    done = subprocess.run([sys.executable, "-m", "stages", *command], stderr=subprocess.PIPE, text=True)
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return last.removeprefix("error: ") if done.returncode else ""


def _tags(verdict: dict[str, Any]) -> dict[str, str]:
    return {"model": MODEL, "version": verdict["version"], "champion": verdict["champion"] or "none"}


def _close(registry: Registry, version: Any, verdict: dict[str, Any], promoted: bool) -> None:
    """Records a verdict in the store, and where the report finds it."""
    verdict["promoted"] = promoted
    registry.close_verdict(verdict["run_id"], version, verdict, _metrics(verdict))
    if VERDICT.parent.is_dir():
        short = {**verdict, "results": {who: _short(of) for who, of in verdict.get("results", {}).items()}}
        temporary = VERDICT.with_suffix(".tmp")
        temporary.write_text(json.dumps(short, indent=1) + "\n")
        temporary.replace(VERDICT)


def _metrics(verdict: dict[str, Any]) -> dict[str, float]:
    test = verdict.get("test") or {}
    found = {key: float(test[key]) for key in ("p", "difference", "low", "won", "lost") if key in test}
    for who, of in verdict.get("results", {}).items():
        found |= {f"{who}_{key}": float(of[key]) for key in ("clear_rate", "return_mean")}
    return found


def _short(result: dict[str, Any]) -> dict[str, Any]:
    return {**result, "episodes": len(result["episodes"])}


def describe(verdict: dict[str, Any]) -> str:
    """A few lines for people."""
    versions = {"challenger": verdict["version"], "champion": verdict["champion"]}
    lines = [
        f"{who:<10}  version {versions[who]}: clear rate {of['clear_rate']:.0%} "
        f"[{of['clear_rate_low']:.0%}, {of['clear_rate_high']:.0%}], return {of['return_mean']:.0f} "
        f"[{of['return_low']:.0f}, {of['return_high']:.0f}] ({len(of['episodes'])} episodes)"
        for who, of in verdict.get("results", {}).items()
    ]
    lines += [f"{verdict['status']}: {reason}" for reason in verdict["reasons"]]
    end = "is champion now" + (", by force" if verdict.get("kind") == "forced" else "")
    lines.append(f"version {verdict['version']} {end if verdict['promoted'] else 'is not promoted'}")
    lines.append(f"{VERDICT} has the verdict; dvc repro report puts it on the page")
    return "\n".join(lines)
