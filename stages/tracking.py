"""Records of every stage: MLflow runs, TensorBoard events, registered models. The only file that imports mlflow.

A run of the pipeline is a parent run, and each of its stages a child run. Stages are processes of their own: those of
one run of the pipeline share the key in MARIO_PIPELINE_KEY, and the first leaves the parent's id for the others in
.mario/pipeline_run.json. A stage that goes on after an interruption goes on in its old run, and its old parent becomes
that of the stages after it. A stage that runs without a key is a pipeline of its own.

What a stage logs goes through an outbox (see stages/outbox.py), so that no store can slow it down or end it. What could
not be sent before the stage ended waits in .mario/unsent/ for the next stage that reaches the same store.
"""

import importlib.metadata
import json
import os
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from stages import claims, digest, git, outbox, paths
from stages.address import TrackingError, explained, first_line, tracking_uri, without_password
from stages.bundle import CARD, WEIGHTS, BundleError
from stages.bundle import find as find_bundle
from stages.events import open_events
from stages.outbox import Outbox, Record, Refused, notice
from stages.params import Params
from stages.record import ALIAS, MODEL, Run, StoredRun, claim_files, flat, milliseconds, outgoing_files, unsent_files

EXPERIMENT = "mario-dreamer"
PIPELINE_KEY = "MARIO_PIPELINE_KEY"
LINKS = {  # tags for what ran a stage, by the variables in which it says so
    "dvc.exp": "DVC_EXP_NAME",
    "image": "MARIO_IMAGE_DIGEST",
    "prefect.flow_run": "MARIO_FLOW_RUN_ID",
    "prefect.flow_run_url": "MARIO_FLOW_RUN_URL",
}
SYSTEM_EVERY = 10.0  # seconds between two samples of the machine's load
REQUIREMENTS = ("mlflow", "torch", "safetensors", "numpy", "gymnasium", "gym-super-mario-bros", "nes-py", "pyyaml")
CHAMPION = "champion"
PARENT, NAME = "mlflow.parentRunId", "mlflow.runName"
FINAL = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "BAD_REQUEST", "INVALID_STATE")  # trying again is no use


@contextmanager
def run(stage: str, params: Params, tags: dict[str, str] | None = None, resume: str | None = None) -> Iterator["Run"]:
    """Records a stage, from here to the end of the block.

    Its status becomes FINISHED, FAILED if an exception leaves the block, or KILLED if that came from a signal. Without
    MLflow the block runs all the same, and `Run.run_id` is None.

    Args:
        tags: besides those that every run has: commit, profile, level, digests of data and ROM
        resume: id of the run to go on in; if it is gone, a new one begins

    Raises:
        TrackingError: the store in MLFLOW_TRACKING_URI cannot be reached or used
    """
    this = _open(stage, params, _described(stage, params, tags or {}), resume)
    try:
        yield this
    except BaseException as error:
        this.close(_status(error))
        raise
    this.close("FINISHED")


def _status(error: BaseException) -> str:
    if isinstance(error, SystemExit):  # 128 + a signal's number is what a stage exits with when one stopped it
        code = error.code
        return "FINISHED" if not code else "KILLED" if isinstance(code, int) and code > 128 else "FAILED"
    return "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"


class _Load:
    """Samples the machine's load into a run, as MLflow's own monitor does, but through the outbox."""

    def __init__(self, box: Outbox, store: "Store", run_id: str):
        import threading

        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        self._monitor = SystemMetricsMonitor(run_id, tracking_uri=store.uri)
        self._step = len(store.client.get_metric_history(run_id, "system/cpu_utilization_percentage"))
        self._outbox, self._run_id, self._end = box, run_id, threading.Event()
        self._thread = threading.Thread(target=self._work, name="system metrics", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        with suppress(Exception):  # drivers and containers know many ways to hide a number: go on without
            while not self._end.wait(SYSTEM_EVERY):
                self._sample()
            self._sample()  # of a short stage the only one

    def _sample(self) -> None:
        self._monitor.collect_metrics()
        values, now = self._monitor.aggregate_metrics(), milliseconds()
        for monitor in self._monitor.monitors:
            monitor.clear_metrics()
        records = [
            Record(self._run_id, "metric", f"system/{name}", value, now, self._step) for name, value in values.items()
        ]
        self._outbox.put(*records)
        self._step += 1

    def close(self) -> None:
        self._end.set()
        self._thread.join()


class Store:
    """An MLflow tracking store and registry."""

    def __init__(self, uri: str):
        self.uri = uri
        self.name = without_password(uri)
        mlflow = _mlflow()
        from mlflow.exceptions import MlflowException

        self._error = MlflowException
        try:
            self.client = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
            experiment = self.client.get_experiment_by_name(EXPERIMENT) or self._new_experiment()
        except Exception as error:  # SQLAlchemy's, requests' and MLflow's own have nothing in common
            raise TrackingError(explained(self.name, error)) from None
        if experiment.lifecycle_stage == "deleted":
            raise TrackingError(
                f"{self.name}: the experiment {EXPERIMENT} is deleted there; "
                f"bring it back with: mlflow experiments restore --experiment-id {experiment.experiment_id}"
            )
        self.experiment_id = experiment.experiment_id

    def _new_experiment(self):
        # A server knows where its artifacts go; beside a database file they go into the repository, wherever we run.
        location = (paths.ROOT / "mlartifacts").as_uri() if self.uri.startswith("sqlite:") else None
        try:
            self.client.create_experiment(EXPERIMENT, artifact_location=location)
        except self._error as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another stage was faster
                raise
        return self.client.get_experiment_by_name(EXPERIMENT)

    def watch_load(self, box: Outbox, run_id: str) -> "_Load":
        return _Load(box, self, run_id)

    def find(self, run_id: str | None):
        """The run, or None if it is not there, or deleted."""
        if run_id is None:
            return None
        try:
            found = self.client.get_run(run_id)
        except self._error as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return found if found.info.lifecycle_stage == "active" else None

    def begin(self, name: str, tags: dict[str, str], params: Params, parent: str | None = None) -> str:
        """The id of a new run."""
        tags = tags | ({PARENT: parent} if parent else {})
        run_id = self.client.create_run(self.experiment_id, tags=tags, run_name=name).info.run_id
        self._log_params(run_id, flat(params.to_dict()))
        return run_id

    def reopen(self, run, tags: dict[str, str], params: Params) -> None:
        """Lets a run go on. Parameters of MLflow cannot change: where they differ from those of old, a tag says so."""
        from mlflow.entities import RunTag

        now, old = flat(params.to_dict()), run.data.params
        if changed := [f"{key}: {old[key]} -> {value}" for key, value in now.items() if old.get(key, value) != value]:
            tags = tags | {"params_changed": "; ".join(changed)[:5000]}
        self._log_params(run.info.run_id, {key: value for key, value in now.items() if key not in old})
        self.client.log_batch(run.info.run_id, tags=[RunTag(key, value) for key, value in tags.items()])
        self.client.update_run(run.info.run_id, status="RUNNING")

    def _log_params(self, run_id: str, params: dict[str, str]) -> None:
        from mlflow.entities import Param

        items = [Param(key, value) for key, value in params.items()]
        for start in range(0, len(items), 100):
            self.client.log_batch(run_id, params=items[start : start + 100])

    def send(self, records: list[Record]) -> None:
        """For the outbox: records of one run and kind, no more than its `BATCH`."""
        from mlflow.entities import Metric, RunTag

        run_id, kind, key, value = records[0][:4]
        try:
            if kind == "metric":
                self.client.log_batch(run_id, metrics=[Metric(*record[2:]) for record in records])
            elif kind == "tag":
                self.client.log_batch(run_id, tags=[RunTag(record.key, record.value) for record in records])
            elif kind == "status":
                self.client.set_terminated(run_id, value)
            else:
                self._send_artifact(run_id, Path(key), value)
        except self._error as error:
            if error.error_code in FINAL:
                raise Refused(f"{kind} of run {run_id}: {first_line(error)}") from None
            raise

    def _send_artifact(self, run_id: str, path: Path, folder: str) -> None:
        if path.is_dir():
            self.client.log_artifacts(run_id, str(path), folder)
        elif path.is_file():
            self.client.log_artifact(run_id, str(path), folder)
        else:
            raise Refused(f"artifact {path}: no such file")
        if path.is_relative_to(outgoing_files()):
            path.unlink()

    def deliver_unsent(self) -> None:
        """Sends what earlier stages could not."""
        for path, records in outbox.kept(unsent_files(), self.name):
            box = Outbox(self.send, self.name)
            box.put(*records)
            if not box.close(0.0):
                path.unlink()

    def end_the_dead(self) -> None:
        """Marks runs as killed whose stage ended without a chance to do so."""
        for dead in claims.abandoned(claim_files(), self.name):
            for run_id in (dead["run_id"], dead["parent_run_id"]):
                run = self.find(run_id)
                if run is not None and run.info.status == "RUNNING":
                    self.client.set_terminated(run_id, "KILLED")

    def registered(self, which: str):
        """The registered model's version of that number or alias.

        Raises:
            TrackingError: there is none; says which there are
        """
        try:
            if which.isdigit():
                return self.client.get_model_version(MODEL, which)
            return self.client.get_model_version_by_alias(MODEL, which)
        except self._error as error:
            if error.error_code not in FINAL:
                raise
        versions = self.client.search_model_versions(f"name = '{MODEL}'")
        if not versions:
            raise TrackingError(f"{self.name}: no registered model {MODEL} yet; train one (dvc repro)")
        numbers = sorted(int(version.version) for version in versions)
        aliases = self.client.get_registered_model(MODEL).aliases
        known = [*map(str, numbers), *(f"{alias} ({version})" for alias, version in aliases.items())]
        raise TrackingError(f"{self.name}: {MODEL} has no version or alias {which!r}; it has {', '.join(known)}")

    def champion(self) -> dict[str, Any] | None:
        """Version and tags of the model that is champion now."""
        try:
            found = self.client.get_model_version_by_alias(MODEL, CHAMPION)
        except self._error as error:
            if error.error_code in FINAL:
                return None
            raise TrackingError(f"{self.name}: {first_line(error)}") from None
        return {"version": str(found.version), "tags": dict(found.tags)}

    def register(self, run_id: str, bundle: Path, tags: dict[str, str]) -> dict[str, str]:
        """Logs the model into the run, registers it and makes it the challenger.

        Returns:
            version, weights_sha256
        """
        mlflow = _mlflow()
        from mlflow.models import Model, ModelSignature
        from mlflow.types import DataType, ParamSchema, ParamSpec, Schema, TensorSpec

        flags = [ParamSpec(name, DataType.boolean, False) for name in ("deterministic", "reset")]
        signature = ModelSignature(
            inputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, 64, 64, 3))]),
            outputs=Schema([TensorSpec(np.dtype(np.int64), (-1,))]),
            params=ParamSchema(flags),
        )
        requirements = [f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in REQUIREMENTS]
        try:
            mlflow.set_tracking_uri(self.uri)
            mlflow.set_registry_uri(self.uri)
            mlflow.set_experiment(experiment_id=self.experiment_id)  # where the model's files go
            with (
                _environment(MLFLOW_HTTP_REQUEST_MAX_RETRIES="3", MLFLOW_HTTP_REQUEST_TIMEOUT="120"),
                warnings.catch_warnings(action="ignore", category=UserWarning),  # that there is no example of an input
            ):
                model = Model.log(
                    artifact_path=None,
                    flavor=mlflow.pyfunc,
                    name="agent",
                    run_id=run_id,
                    python_model=str(paths.ROOT / "stages" / "player.py"),
                    code_paths=[str(paths.ROOT / "dreamer"), str(paths.ROOT / "stages")],
                    artifacts={"bundle": str(bundle.resolve())},
                    pip_requirements=requirements,
                    signature=signature,
                )
                try:
                    self.client.create_registered_model(MODEL)
                except self._error as error:
                    if error.error_code != "RESOURCE_ALREADY_EXISTS":
                        raise
                uri = f"models:/{model.model_id}"
                with tempfile.TemporaryDirectory(prefix="mario-registered-") as folder:
                    stored = Path(mlflow.artifacts.download_artifacts(uri, dst_path=folder))
                    hashes = self._hashes(stored, bundle)
                version = self.client.create_model_version(
                    MODEL,
                    uri,
                    run_id,
                    tags=tags | hashes,
                    model_id=model.model_id,
                    description=(bundle / CARD).read_text(),
                ).version
                self.client.set_registered_model_alias(MODEL, ALIAS, version)
        except Exception as error:
            raise TrackingError(f"{self.name}: cannot register {bundle.name}: {first_line(error)}") from None
        return {"version": str(version), "weights_sha256": hashes["weights_sha256"]}

    def _hashes(self, stored: Path, bundle: Path) -> dict[str, str]:
        """Of a model as the store gives it back, if that holds the bundle it was given."""
        weights = digest.sha256(bundle / WEIGHTS)
        kept = find_bundle(stored)
        if kept is None or digest.tree_sha256(kept) != digest.tree_sha256(bundle):
            raise TrackingError("the store gave back other files than it was given")
        return {"artifact_sha256": digest.tree_sha256(stored), "weights_sha256": weights}

    def fetch(self, which: str, fresh: bool = False) -> Path:
        """The files of a registered version, which are those that were registered.

        Raises:
            TrackingError: the store has no such model, or cannot give it
            BundleError: they are others
        """
        mlflow = _mlflow()
        version = self.registered(which)
        kept = paths.ROOT / ".mario" / "models" / version.source.rpartition("/")[2]
        expected = version.tags.get("artifact_sha256")
        if not fresh and kept.exists() and digest.tree_sha256(kept) == expected:
            return kept
        mlflow.set_tracking_uri(self.uri)
        mlflow.set_registry_uri(self.uri)
        kept.parent.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(dir=kept.parent) as folder,
            _environment(MLFLOW_HTTP_REQUEST_MAX_RETRIES="3", MLFLOW_HTTP_REQUEST_TIMEOUT="120"),
        ):
            uri = f"models:/{MODEL}/{version.version}"
            files = Path(mlflow.artifacts.download_artifacts(uri, dst_path=f"{folder}/{kept.name}"))
            if (found := digest.tree_sha256(files)) != expected:
                raise BundleError(
                    f"{MODEL} version {version.version}: its files are not those that were registered "
                    f"(SHA-256 {found[:12]}, registered {str(expected)[:12]}); register it anew (dvc repro --force "
                    "--single-item evaluate) or take another version (mario models)"
                )
            if kept.exists():  # damaged here, or fetched by another process just now
                kept.rename(f"{folder}/before")
            files.rename(kept)
        return kept


def _open(stage: str, params: Params, tags: dict[str, str], resume: str | None) -> Run:
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{params.profile}"
    events = paths.ROOT / ".mario" / "tensorboard" / stage
    uri = tracking_uri()
    if _mlflow() is None:
        notice("MLflow is not installed, no runs are recorded (pip install mlflow)")
        return Run(tags, open_events(events / f"{name}-{os.getpid()}", False))
    store = Store(uri)
    try:
        store.deliver_unsent()
        store.end_the_dead()
        old = store.find(resume)
        if resume and old is None:
            notice(f"run {resume} is not in {store.name} any more; goes on in a new one")
        parent_id = _parent(store, params, tags, old)
        if old is None:
            run_id = store.begin(stage, tags, params, parent_id)
        else:
            run_id = old.info.run_id
            store.reopen(old, tags | {PARENT: parent_id}, params)
        before = next(events.glob(f"*-{run_id[:8]}"), None)
        return StoredRun(
            store, run_id, parent_id, tags, open_events(before or events / f"{name}-{run_id[:8]}", before is not None)
        )
    except store._error as error:
        raise TrackingError(explained(store.name, error)) from None


def _parent(store: Store, params: Params, tags: dict[str, str], old) -> str:
    """The run of this pipeline: that of the run which goes on, that which another stage began, or a new one."""
    path, key = paths.ROOT / ".mario" / "pipeline_run.json", os.environ.get(PIPELINE_KEY)
    tags = {name: value for name, value in tags.items() if name != "dvc.stage"}
    parent = store.find(old.data.tags.get(PARENT)) if old is not None else None
    if parent is None and key and path.exists():
        known = json.loads(path.read_text())
        if (known["key"], known["tracking_uri"]) == (key, store.name):
            parent = store.find(known["parent_run_id"])
    if parent is None:
        parent_id = store.begin(f"pipeline {time.strftime('%Y-%m-%d %H:%M')} {params.profile}", tags, params)
    else:
        parent_id = parent.info.run_id
        store.reopen(parent, tags, params)
    if key:
        about = {
            "key": key,
            "parent_run_id": parent_id,
            "experiment_id": store.experiment_id,
            "tracking_uri": store.name,
        }
        _write(path, about)
    return parent_id


def _described(stage: str, params: Params, given: dict[str, str]) -> dict[str, str]:
    """The tags of every run."""
    from dreamer.mario import rom_sha256

    commit, dirty = git.state()
    tags = {
        "git.commit": commit or "unknown",
        "git.dirty": "unknown" if dirty is None else str(dirty).lower(),
        "dvc.stage": os.environ.get("DVC_STAGE", stage),
        "profile": params.profile,
        "level": params.env.level,
        "rom_sha256": rom_sha256(),
    }
    if commit:
        tags["mlflow.source.git.commit"] = commit
    tags |= {tag: os.environ[variable] for tag, variable in LINKS.items() if os.environ.get(variable)}
    return tags | {key: str(value) for key, value in given.items()}


def fetch(which: str, fresh: bool = False) -> Path:
    """The bundle of a registered model by version or alias, kept in .mario/models/ and checked each time.

    Args:
        fresh: from the store, whatever is kept here

    Raises:
        TrackingError: the store cannot be used, or has no such model
        BundleError: the files are not those that were registered
    """
    if _mlflow() is None:
        raise TrackingError("MLflow is not installed, so there is no registry; name a checkpoint file instead")
    store = Store(tracking_uri())
    try:
        files = store.fetch(which, fresh)
    except (store._error, OSError) as error:
        raise TrackingError(f"{store.name}: cannot fetch model {which}: {first_line(error)}") from None
    if (found := find_bundle(files)) is None:
        raise BundleError(f"{MODEL} {which}: no {WEIGHTS} in it; register it anew (dvc repro --force evaluate)")
    return found


def registered_models() -> list[dict[str, str]]:
    """Names for `fetch`, the latest first, each with its aliases.

    Raises:
        TrackingError: the store cannot be used
    """
    uri = tracking_uri()
    kept = Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:") else None
    if (kept and not kept.exists()) or _mlflow() is None:  # nothing recorded yet, and looking shall not make it
        return []
    store = Store(uri)
    try:
        versions = store.client.search_model_versions(f"name = '{MODEL}'")
        aliases = store.client.get_registered_model(MODEL).aliases if versions else {}
    except store._error as error:
        raise TrackingError(explained(store.name, error)) from None
    return [
        {
            "name": number,
            "about": ", ".join(["version", *(alias for alias, of in sorted(aliases.items()) if str(of) == number)]),
        }
        for number in sorted((str(version.version) for version in versions), key=int, reverse=True)
    ]


def serve(player: type) -> None:
    """Called by the model's code when MLflow loads it: an instance of `player` is the model."""
    import mlflow.models
    import mlflow.pyfunc

    mlflow.models.set_model(type("Model", (player, mlflow.pyfunc.PythonModel), {})())


def _mlflow():
    """The module, imported late as that takes seconds, or None where it is not installed."""
    os.environ.update(MLFLOW_DISABLE_TELEMETRY="true", DO_NOT_TRACK="true")
    os.environ.update(
        MLFLOW_HTTP_REQUEST_MAX_RETRIES="0", MLFLOW_HTTP_REQUEST_TIMEOUT="8"
    )  # trying again is for the outbox
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    try:
        import mlflow
    except ModuleNotFoundError as error:
        if error.name != "mlflow":
            raise
        return None
    import logging

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return mlflow


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {key: os.environ.get(key, "") for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.update(before)


def _write(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)
