"""Seeded random play in parallel emulators: the replay that training starts from."""

from tqdm import tqdm

from dreamer.archive import Archive
from dreamer.mario import make_env
from dreamer.replay import Replay, digest
from dreamer.rollout import RandomPolicy, Rollout, episode_seeds
from stages import tracking
from stages.params import load
from stages.paths import ARCHIVE, SEED_DATA


def main() -> None:
    params = load()
    SEED_DATA.mkdir(parents=True, exist_ok=True)
    with tracking.run("collect", params) as run:
        replay, episodes = Replay(params.replay), []
        policy = RandomPolicy(params.collect.probabilities, params.seed)
        envs = [make_env(params.env) for _ in range(params.collect.envs)]
        archive = Archive(params.archive) if params.archive.share else None
        rollout = Rollout(envs, policy, episode_seeds(params.seed, "collect"), archive)
        streams = [f"seed{i}" for i in range(len(envs))]
        decisions, target = 0, params.collect.steps // params.env.action_repeat
        with tqdm(total=target, desc="collect", unit="decision", mininterval=1) as bar:
            while decisions < target:
                steps, ended, taken = rollout.step()
                replay.add(streams, steps)
                episodes += ended
                decisions += taken
                bar.update(taken)
                if ended:
                    bar.set_postfix(episodes=len(episodes), best_x=max(episode.info["best_x"] for episode in episodes))
        rollout.stop()
        replay.save(SEED_DATA, partial=True)
        replay.prune(SEED_DATA)
        (SEED_DATA / ARCHIVE).unlink(missing_ok=True)
        if archive:
            archive.save(SEED_DATA / ARCHIVE)
        frames = decisions * params.env.action_repeat
        run.tags({"data_sha256": digest(SEED_DATA)})
        if played := [episode for episode in episodes if not episode.replayed]:
            returns = [episode.total_reward for episode in played]
            run.metrics(
                {
                    "collect_episodes": len(episodes),
                    "collect_return": sum(returns) / len(returns),
                    "collect_best_x": max(episode.info["best_x"] for episode in played),
                    "collect_farthest_x": max(episode.info["best_x"] for episode in episodes),
                },
                frames,
            )
    size = sum(path.stat().st_size for path in SEED_DATA.glob("*.npz"))
    print(f"collected {frames} frames in {len(episodes)} episodes, {size / decisions / 1000:.1f} kB each decision")
