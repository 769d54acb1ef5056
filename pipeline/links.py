"""What a flow run's page shows, and how it, MLflow, DVC and the image know of each other."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from prefect.client.orchestration import get_client
from prefect.states import State

from pipeline import demo
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.flow import Run

PARENT, MODEL = Path(".mario/pipeline_run.json"), Path("reports/model.json")
LOCAL = "http://127.0.0.1:5000"  # where `mario ui` shows a database file


def artifacts(run: "Run", states: dict[str, State]) -> None:
    """The stages as a table, the evaluation, and the way to MLflow; and tags of the same."""
    table = [{"stage": name, "state": state.name, "why": state.message or ""} for name, state in states.items()]
    create_table_artifact(table, key="stages", description="What became of each stage")
    if demo.EVALUATION.exists():
        evaluation = json.loads(demo.EVALUATION.read_text())
        create_markdown_artifact(evaluated(evaluation), key="evaluation", description=str(demo.EVALUATION))
    tags = {f"runner:{run.runner}"}
    if found := mlflow_run(str(run.id)):
        url, run_id = found
        create_link_artifact(url, "MLflow", key="mlflow", description=f"run {run_id}")
        tags.add(f"mlflow:{run_id}")
        if any(state.name in ("Ran", "Restored") for state in states.values()):
            tags.add(f"dvc-exp:{run.experiment}")
    if run.runner == "docker" and (image := _image()):
        tags.add(f"image:{image}")
    with get_client(sync_client=True) as client:
        known = set(client.read_flow_run(run.id).tags)
        client.update_flow_run(run.id, tags=known | tags)


def mlflow_run(key: str) -> tuple[str, str] | None:
    """Address and id of the parent run that the stages of this run of the pipeline share.

    If none of them ran: of the run that made the model which is here.
    """
    about = json.loads(PARENT.read_text()) if PARENT.exists() else {}
    run_id = about.get("parent_run_id") if about.get("key") == key else None
    if run_id is None and MODEL.exists():
        run_id = json.loads(MODEL.read_text()).get("run_id")
    if not run_id or "experiment_id" not in about:
        return None
    server = about["tracking_uri"] if about["tracking_uri"].startswith("http") else LOCAL
    return f"{server}/#/experiments/{about['experiment_id']}/runs/{run_id}", run_id


def evaluated(evaluation: dict[str, Any]) -> str:
    lines = ["| play | clear rate | return | best x | episodes |", "| --- | --- | --- | --- | --- |"]
    for mode in ("sampled", "greedy"):
        of = evaluation[mode]
        rate = f"{of['clear_rate']:.0%} [{of['clear_rate_low']:.0%}, {of['clear_rate_high']:.0%}]"
        returned = f"{of['return_mean']:.0f} [{of['return_low']:.0f}, {of['return_high']:.0f}]"
        lines.append(f"| {mode} | {rate} | {returned} | {of['best_x_max']} | {of['episodes']} |")
    return "\n".join(lines)


def played(model: str, result: dict[str, Any]) -> None:
    """What `evaluate` shows."""
    interval = f"[{result['clear_rate_low']:.0%}, {result['clear_rate_high']:.0%}]"
    text = f"**{model}** ({result['checkpoint']}): clear rate {result['clear_rate']:.0%} {interval}"
    episodes = [
        {key: row[key] for key in ("seed", "outcome", "return", "best_x", "decisions")} for row in result["episodes"]
    ]
    create_markdown_artifact(f"{text}, mean return {result['return_mean']:.0f}", key="evaluation")
    create_table_artifact(episodes, key="episodes", description="Every episode")


def _image() -> str | None:
    from pipeline import engine

    try:
        with engine.connect() as client:
            return engine.digest(engine.image(client))
    except UserError:
        return None
