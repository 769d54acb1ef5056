"""The pipeline as Prefect flows: dvc.yaml's stages as tasks, each by `dvc repro`, side by side where the graph allows.

`pipeline` runs what changed, and with `promote.automatic` lets the gate judge the model that came of it; `retrain` does
so only if anything did, and never beside another run; `evaluate` plays a registered model again. A task's state says
what became of its stage: Ran, Cached, Restored, or Failed with the reason.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any, Literal

from prefect import flow, get_run_logger, runtime, task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectNotFound
from prefect.futures import PrefectFuture
from prefect.states import Cancelled, Completed, Crashed, Failed, State
from prefect.task_runners import ThreadPoolTaskRunner

from pipeline import graph, launch, links, repro, settings, status, workspace
from pipeline.errors import TryAgain, UserError
from pipeline.session import Session
from pipeline.watch import OUT_OF_TIME, Watch

GPU = "mario-gpu"  # how many stages use a GPU at a time; `prefect gcl update mario-gpu --limit 2` where there are two
RETRIES = [2, 5, 8, 8]  # seconds before each; short, as a run that is cancelled waits for them
SIDE_BY_SIDE = 8
EPISODES, SEED = 100, 400_000  # of `evaluate`: starts that no training, choice or report uses

echo = False  # the `mario` command line shows the stages' own output, and tells in a line what became of each


@flow(name="pipeline", task_runner=ThreadPoolTaskRunner(max_workers=SIDE_BY_SIDE), log_prints=False)
def pipeline(
    profile: str | None = None,
    overrides: list[str] | None = None,
    runner: Literal["process", "docker"] | None = None,
    minutes: float | None = None,
) -> State:
    """Runs what changed.

    Args:
        profile: another than params.yaml's
        overrides: parameters of this run alone, as train.steps=20000; with these or a profile, the result is kept as
            a DVC experiment and the repository put back as it was
        runner: another than MARIO_RUNNER's
        minutes: budget by the clock on the wall, after which the run stops resumably; 0: none; default: params.yaml's
    """
    return Run(runner, minutes).go(profile, overrides or [])


@flow(name="retrain", task_runner=ThreadPoolTaskRunner(max_workers=SIDE_BY_SIDE), log_prints=False)
def retrain(runner: Literal["process", "docker"] | None = None, minutes: float | None = None) -> State:
    """Runs what changed since the last time; does nothing if nothing did, or if another run is at work here."""
    run = Run(runner, minutes)
    if not run.claim(wait=False):
        return Completed(name="Skipped", message=f"another run is at work here: {run.holder()}")
    if status.changed():
        return run.go()
    run.give_back()
    return Completed(name="UpToDate", message="no code, data or parameter has changed (dvc status)")


@flow(name="evaluate", log_prints=False)
def evaluate(
    model: str = "champion",
    episodes: int = EPISODES,
    seed: int = SEED,
    runner: Literal["process", "docker"] | None = None,
) -> State:
    """Lets a registered model play again, on starts of its own. Changes no result.

    Args:
        model: version or alias
        seed: of the first start
    """
    return Run(runner, 0).play(model, episodes, seed)


class Run:
    """One flow run at work in this repository."""

    def __init__(self, runner: str | None, minutes: float | None):
        self.settings = settings.load()
        self.minutes = self.settings.minutes if minutes is None else minutes
        self.runner = runner or os.environ.get("MARIO_RUNNER", "process")
        self.id, self.name = runtime.flow_run.id, runtime.flow_run.name
        self.url = runtime.flow_run.ui_url or ""
        self.log = get_run_logger()
        self.experiment = f"mario-{self.name}"
        self.watch = Watch(self.id, self.settings.stop_seconds + 1, self.minutes)
        self._claim = workspace.Claim()
        self._claimed = False

    def environment(self) -> dict[str, str]:
        """What a stage is told of this run, for its tags in MLflow."""
        return {
            **os.environ,
            **launch.SILENT,
            launch.PIPELINE_KEY: str(self.id),
            "MARIO_RUNNER": self.runner,
            "MARIO_FLOW_RUN_ID": str(self.id),
            "MARIO_FLOW_RUN_URL": self.url,
            "DVC_EXP_NAME": self.experiment,
        }

    def claim(self, wait: bool) -> bool:
        """Takes the repository, if need be once it is free. A flow run that died with it is marked as crashed."""
        note = {"flow_run_id": str(self.id), "name": self.name, "pid": os.getpid()}
        while not self._claimed:
            dead = self._claim.take(note)
            if dead is not None:
                self._claimed = True
                bury(dead)
            elif not wait or self.watch.why:
                return False
            else:
                self._tell(f"waits for {self.holder()}, which is at work here")
                while not self.watch.why and self._claim.take(note) is None:
                    time.sleep(1)
                self._claimed = not self.watch.why
        return True

    def give_back(self) -> None:
        if self._claimed:
            self._claim.give_back()
            self._claimed = False

    def holder(self) -> str:
        note = self._claim.holder()
        return f"run {note.get('name', 'unknown')} (process {note.get('pid', 'unknown')})"

    def go(self, profile: str | None = None, overrides: Sequence[str] = ()) -> State:
        """All stages, in the graph's order. Returns the flow run's state."""
        futures: dict[str, PrefectFuture] = {}
        try:
            with self.watch:
                if not self.claim(wait=True):
                    return self._stopped({})
                with workspace.overridden(profile, overrides, lambda: self._save(futures)):
                    try:
                        self._submit(futures)
                    except BaseException:
                        self.watch.stop("interrupted")
                        for future in futures.values():
                            future.wait()
                        raise
                    if not all(future.state.is_completed() for future in futures.values()):
                        return self._stopped(futures)
            counts = [future.state.name for future in futures.values()]
            told = ", ".join(f"{counts.count(name)} {name.lower()}" for name in dict.fromkeys(counts))
            return Completed(message=told)
        except UserError as error:
            return Failed(message=str(error))
        except KeyboardInterrupt:
            return Cancelled(message="Ctrl-C; run again to go on")
        finally:
            self._reap()
            self.give_back()

    def _submit(self, futures: dict[str, PrefectFuture]) -> None:
        gpu_limit()
        self.changes, self.known = status.changed(), status.locked()
        for name, needs in graph.load().items():
            futures[name] = stage.with_options(name=name).submit(
                self, name, wait_for=[futures[need] for need in needs if need in futures]
            )
        for future in futures.values():
            future.wait()
        evaluated = futures.get("evaluate")
        fresh = evaluated is not None and evaluated.state.name == repro.RAN
        if fresh and settings.promotes() and all(future.state.is_completed() for future in futures.values()):
            futures["promote"] = promotion.submit(self)
            futures["promote"].wait()
        links.artifacts(self, {name: future.state for name, future in futures.items()})

    def _save(self, futures: dict[str, PrefectFuture]) -> None:
        """Keeps what this run made as a DVC experiment, of the name that MLflow's runs have as a tag."""
        if not any(future.state.name in (repro.RAN, repro.RESTORED) for future in futures.values()):
            return
        if not all(future.state.is_completed() for future in futures.values()):
            return
        if subprocess.run(["git", "rev-parse", "-q", "--verify", "HEAD"], capture_output=True).returncode:
            return  # no commit to start from
        command = [sys.executable, "-m", "dvc", "--wait-for-lock", "exp", "save", "--force", "--name", self.experiment]
        saved = subprocess.run(command, capture_output=True, text=True)
        if saved.returncode:
            self._tell(f"no DVC experiment: {repro.reason(saved.stderr.splitlines())}")

    def _stopped(self, futures: dict[str, PrefectFuture]) -> State:
        failed = {name: future.state for name, future in futures.items() if future.state.is_failed()}
        if failed:
            name, state = next(iter(failed.items()))
            return Failed(message=f"{name}: {state.message}")
        if self.watch.why == OUT_OF_TIME:
            return Completed(name="OutOfTime", message=f"{self.minutes:g} minutes are over; run again to go on")
        return Cancelled(message=f"{self.watch.why}; run again to go on")

    def execute(self, command: Sequence[str], stdout: Any = None) -> tuple[int, list[str]]:
        """Exit code and lines of a command, which ends when this run does."""
        output = repro.Output(get_run_logger().info)

        def take(chunk: bytes) -> None:
            if echo:
                sys.stderr.buffer.write(chunk)
                sys.stderr.flush()
            output(chunk)

        session = Session(command, self.environment(), take, stdout)
        with self.watch.over(session):
            code = session.wait()
        output.close()
        return code, list(output.lines)

    def play(self, model: str, episodes: int, seed: int) -> State:
        command = [sys.executable, "-m", "pipeline.launch", "play", "--model", model, "--json"]
        command += ["--episodes", str(episodes), "--seed", str(seed)]
        gpu_limit()
        try:
            with self.watch, tempfile.TemporaryFile("w+") as file, a_gpu(self.watch):
                code, lines = self.execute(command, file)
                if self.watch.why:
                    return self._stopped({})
                if code:
                    return Failed(message=repro.reason(lines) or f"exit code {code}")
                file.seek(0)
                played = json.load(file)
        finally:
            self._reap()
        links.played(model, played)
        return Completed(message=f"{model}: clear rate {played['clear_rate']:.0%} in {episodes} episodes")

    def _reap(self) -> None:
        """What a stage that had to be killed may have left."""
        if self.runner != "docker":
            return
        from pipeline import engine

        try:
            with engine.connect() as client:
                engine.reap(client, 1)
        except UserError as error:
            self._tell(str(error))

    def _tell(self, text: str) -> None:
        self.log.info(text)
        if echo:
            print(text, file=sys.stderr, flush=True)


def worth_another_try(_task: Any, _run: Any, state: State) -> bool:
    """An engine that is gone or a lock that is held, not a stage that fails."""
    return isinstance(state.result(raise_on_failure=False), TryAgain)


@task(cache_policy=NO_CACHE, retries=len(RETRIES), retry_delay_seconds=RETRIES, retry_condition_fn=worth_another_try)
def stage(run: Run, name: str) -> State:
    """One stage of dvc.yaml."""
    if run.watch.why:
        return Cancelled(message=run.watch.why)
    started = time.monotonic()
    with a_gpu(run.watch) if graph.uses_gpu(name) else contextlib.nullcontext():
        code, lines = run.execute(repro.command(name))
    if run.watch.why and code:
        return Cancelled(message=f"{run.watch.why}, its work is kept")
    try:
        outcome = repro.outcome(lines, code)
    except repro.StageFailed as error:
        told, state = f"{name}: Failed, {error}", Failed(message=str(error))
    else:
        message = run_because(run, name) if outcome != repro.CACHED else "nothing it depends on has changed"
        seconds = time.monotonic() - started
        told, state = f"{name}: {outcome} in {seconds:.0f} s, {message}", Completed(name=outcome, message=message)
    run._tell(told)
    return state


@task(name="promote", cache_policy=NO_CACHE)
def promotion(run: Run) -> State:
    """The gate, for the model that this run has registered."""
    if run.watch.why:
        return Cancelled(message=run.watch.why)
    with a_gpu(run.watch):
        code, lines = run.execute([sys.executable, "-m", "pipeline.cli", "promote", "--automatic"])
    if run.watch.why and code:
        return Cancelled(message=run.watch.why)
    try:
        name, why = repro.judged(lines, code)
    except repro.StageFailed as error:
        run._tell(f"promote: Failed, {error}")
        return Failed(message=str(error))
    run._tell(f"promote: {name}, {why}")
    return Completed(name=name, message=why)


def run_because(run: Run, name: str) -> str:
    """Why a stage was not up to date."""
    if name not in run.known:
        return "it had not run here yet"
    return status.why(run.changes[name]) if name in run.changes else "what it reads has changed in this run"


class a_gpu:
    """A context in which no more than the limit's number of stages of all runs are at a time."""

    def __init__(self, watch: Watch):
        self._watch, self._slot = watch, None

    def __enter__(self) -> None:
        while not self._watch.why:
            slot = concurrency(GPU, occupy=1, timeout_seconds=5, lease_duration=60)
            try:
                slot.__enter__()
            except TimeoutError:
                continue
            self._slot = slot
            return

    def __exit__(self, *error: Any) -> None:
        if self._slot is not None:
            self._slot.__exit__(*error)


def gpu_limit() -> None:
    """Makes the limit where there is none yet."""
    with get_client(sync_client=True) as client:
        try:
            client.read_global_concurrency_limit_by_name(GPU)
        except ObjectNotFound:
            client.upsert_global_concurrency_limit_by_name(GPU, 1)


def bury(dead: dict[str, Any]) -> None:
    """Tells the server of a flow run that was killed before it could."""
    if not dead.get("flow_run_id"):
        return
    with get_client(sync_client=True) as client:
        try:
            state = client.read_flow_run(dead["flow_run_id"]).state
        except ObjectNotFound:  # of another server
            return
        if state is None or not state.is_final():
            client.set_flow_run_state(dead["flow_run_id"], Crashed(message="its process was killed"), force=True)
