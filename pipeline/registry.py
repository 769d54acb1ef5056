"""The registered models in MLflow, who of them is champion, and the log that says since when and why.

MLflow keeps no history of its aliases, and cannot set one only if it still stands where one thinks. So the log decides
who is champion, and the alias follows it. The log is a registered model of its own, `mario-dreamer-champions`: MLflow
numbers its versions one after another and never gives a number twice, also to two clients at once. Each entry names
the entry it was made after; one that names another than the last valid one before it came too late and counts for
nothing. Everybody who reads the log comes to the same result, so two promotions at once cannot both win, and nobody
needs a lock that a dead process would keep.

Verdicts, also those that promote nobody, are runs of the experiment `mario-dreamer-promotions`.
"""

import getpass
import logging
import os
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

MODEL, CHAMPIONS, EXPERIMENT = "mario-dreamer", "mario-dreamer-champions", "mario-dreamer-promotions"
CHAMPION, CHALLENGER = "champion", "challenger"
DATABASE = Path("mlflow.db")
MISSING = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


@dataclass(frozen=True)
class Term:
    """An entry of the log: from then on `version` was champion."""

    number: int
    version: str
    kind: str  # promotion, forced, rollback, shipped
    at: str  # UTC, ISO 8601
    by: str
    reason: str
    verdict_run: str


class Registry:
    """MLflow's registry at MLFLOW_TRACKING_URI, or in mlflow.db.

    Raises:
        UserError: there is none, or it cannot be used
    """

    def __init__(self):
        self.uri = os.environ.get("MLFLOW_TRACKING_URI", "").strip().rstrip("/") or f"sqlite:///{DATABASE}"
        if self.uri == f"sqlite:///{DATABASE}" and not DATABASE.exists():
            raise UserError(f"{DATABASE}: nothing is registered here yet; train a model (dvc repro)")
        os.environ.update(MLFLOW_HTTP_REQUEST_MAX_RETRIES="1", MLFLOW_HTTP_REQUEST_TIMEOUT="30")
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        import mlflow
        from mlflow.exceptions import MlflowException

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.ERROR)
        self._error = MlflowException
        try:
            self.client = mlflow.MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)
            self.client.search_registered_models(max_results=1)
        except Exception as error:  # SQLAlchemy's, requests' and MLflow's own have nothing in common
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            remedy = "start it (mlflow server)" if self.uri.startswith("http") else "correct it"
            raise UserError(
                f"MLFLOW_TRACKING_URI={_without_password(self.uri)}: cannot be used ({reason}); {remedy}, "
                "or unset it to use mlflow.db"
            ) from None

    def versions(self) -> list[Any]:
        """MLflow's model versions, the oldest first, with their aliases."""
        return self._versions_of(MODEL)

    def _versions_of(self, name: str) -> list[Any]:
        found, page = [], None
        while page != "":
            listed = self.client.search_model_versions(f"name = '{name}'", max_results=1000, page_token=page)
            found += listed
            page = listed.token or ""
        return sorted(found, key=lambda version: int(version.version))

    def aliases(self) -> dict[str, str]:
        """Of the model: version by alias."""
        try:
            found = self.client.get_registered_model(MODEL).aliases
        except self._error as error:
            if error.error_code not in MISSING:
                raise
            return {}
        return {alias: str(version) for alias, version in found.items()}

    def version(self, which: str) -> Any:
        """The model's version of that number or alias; champion is who the log says.

        Raises:
            UserError: there is none; says which there are
        """
        aliases = self.aliases()
        wanted = self.champion() if which == CHAMPION else aliases.get(which, which)
        try:
            if wanted is not None and str(wanted).isdigit():
                return self.client.get_model_version(MODEL, wanted)
        except self._error as error:
            if error.error_code not in MISSING:
                raise
        versions = self.versions()
        if not versions:
            raise UserError(f"{_without_password(self.uri)}: no model is registered yet; train one (dvc repro)")
        known = [version.version for version in versions]
        known += [f"{alias} ({version})" for alias, version in aliases.items()]
        raise UserError(f"{MODEL} has no version or alias {which!r}; it has {', '.join(map(str, known))}")

    def terms(self) -> list[Term]:
        """The log without the entries that came too late, the oldest first."""
        found: list[Term] = []
        for entry in self._versions_of(CHAMPIONS):
            tags, last = entry.tags, found[-1].number if found else 0
            if tags.get("after") == str(last):
                named = {key: tags.get(key, "") for key in ("version", "kind", "at", "by", "reason", "verdict_run")}
                found.append(Term(int(entry.version), **named))
        return found

    def champion(self, terms: list[Term] | None = None) -> str | None:
        """The version that is champion: as the log says; without a log, where somebody set the alias by hand."""
        terms = self.terms() if terms is None else terms
        return terms[-1].version if terms else self.aliases().get(CHAMPION)

    def settle(self) -> None:
        """Sets the alias where the log says, however often the log changes meanwhile."""
        while terms := self.terms():
            if self.aliases().get(CHAMPION) == terms[-1].version:
                return
            self.client.set_registered_model_alias(MODEL, CHAMPION, terms[-1].version)

    def appoint(self, version: Any, after: int, kind: str, reason: str, verdict_run: str) -> Term | None:
        """Makes a version champion, if the log's last valid entry still is number `after` (0: there is none).

        Returns:
            the entry, or None: another one was faster
        """
        tags = {"after": str(after), "version": str(version.version), "kind": kind, "at": now(), "by": user()}
        tags |= {"reason": reason[:5000], "verdict_run": verdict_run}
        try:
            self.client.create_registered_model(
                CHAMPIONS, description=f"Who of {MODEL} was champion, since when and why. Written by mario promote."
            )
        except self._error as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        entry = self.client.create_model_version(
            CHAMPIONS,
            version.source,
            verdict_run or None,
            tags=tags,
            description=reason[:5000],
            model_id=version.source.rpartition("/")[2],
        )
        mine = next((term for term in self.terms() if term.number == int(entry.version)), None)
        if mine is None:
            self.client.set_model_version_tag(CHAMPIONS, entry.version, "void", "came too late")
        self.settle()
        return mine

    def open_verdict(self, name: str, tags: dict[str, str]) -> str:
        """A run for a verdict; its id."""
        experiment = self.client.get_experiment_by_name(EXPERIMENT)
        if experiment is None:
            beside = Path("mlartifacts").resolve().as_uri() if self.uri.startswith("sqlite:") else None
            try:
                self.client.create_experiment(EXPERIMENT, artifact_location=beside)
            except self._error as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            experiment = self.client.get_experiment_by_name(EXPERIMENT)
        return self.client.create_run(experiment.experiment_id, run_name=name, tags=tags).info.run_id

    def close_verdict(self, run_id: str, version: Any, verdict: dict[str, Any], metrics: dict[str, float]) -> None:
        """Writes a verdict into its run, and what it comes to onto the version."""
        status = verdict["status"]
        for key, value in metrics.items():
            self.client.log_metric(run_id, key, value)
        self.client.set_tag(run_id, "verdict", status)
        self.client.log_dict(run_id, verdict, "verdict.json")
        self.client.set_terminated(run_id, "FAILED" if status == "ERROR" else "FINISHED")
        words = {"verdict": status, "at": verdict["at"], "reasons": "; ".join(verdict["reasons"]), "run": run_id}
        for key, value in words.items():
            self.client.set_model_version_tag(MODEL, version.version, f"gate.{key}", value[:5000])

    def verdicts(self) -> list[Any]:
        """The runs of all verdicts, the oldest first."""
        experiment = self.client.get_experiment_by_name(EXPERIMENT)
        found, page = [], None
        while experiment is not None and page != "":
            listed = self.client.search_runs(
                [experiment.experiment_id], order_by=["attributes.start_time ASC"], max_results=1000, page_token=page
            )
            found += listed
            page = listed.token or ""
        return found


def standing(terms: list[Term]) -> list[Term]:
    """Those who were champion and were not rolled back, the present one last: whom a rollback can go back to."""
    stack: list[Term] = []
    for term in terms:
        if term.kind != "rollback":
            stack.append(term)
            continue
        while stack and stack[-1].version != term.version:
            stack.pop()
        if not stack:
            stack.append(term)
    return stack


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user may have no name
        return str(os.getuid())


def day(milliseconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(milliseconds / 1000))


def _without_password(uri: str) -> str:
    head, at, tail = uri.rpartition("@")
    return f"{head.partition('://')[0]}://{tail}" if at and not uri.startswith("sqlite:") else uri
