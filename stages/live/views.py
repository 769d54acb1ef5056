"""What is to be seen of a session: numbers, and pictures (..., H, W, 3) uint8."""

from typing import Any

import numpy as np

from stages.live.session import Session


def view(session: Session) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The present step; its pictures are the screen, what the agent sees, and what the model shows."""
    dream, episode = session.dream, session.episode
    thoughts = dream.thoughts if dream else session.thoughts
    info = dream.info if dream else episode.info
    obs = dream.obs if dream else session.steps.obs[0]
    numbers = {
        "mode": "dream" if dream else "game",
        "model": session.model,
        "level": session.level,
        "seed": episode.seed,
        "greedy": session.greedy,
        "taken": session.hands.on,
        "by_hand": session.hands.latest,
        "decisions": episode.decisions,
        "return": episode.total_reward,
        **{name: info[name] for name in ("x", "best_x", "clock", "outcome")},
        "action": dream.action if dream else session.action,
        "probs": [round(float(p), 4) for p in thoughts.probs[0]],
        "value": float(thoughts.value[0]),
        "reward": float(thoughts.reward[0]),
        "goes_on": float(thoughts.goes_on[0]),
        "row": session.history[-1],  # of the charts
        "dream": dream
        and {
            "decisions": dream.decisions,
            "total_reward": dream.total_reward,
            "real_total": dream.real_total,
            "over": dream.over,
            "error": float(np.abs(thoughts.image[0].astype(np.int16) - obs).mean()),
        },
    }
    return numbers, {"screen": session.env.render(), "sees": obs, "model": thoughts.image[0]}


def film_view(session: Session) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What comes next, as dreamt: H steps."""
    film = session.film
    numbers = {
        "film": film.step,
        "actions": film.actions.tolist(),
        "reward": [round(float(reward), 2) for reward in film.thoughts.reward],
        "goes_on": [round(float(chance), 4) for chance in film.thoughts.goes_on],
    }
    return numbers, {"film": film.thoughts.image}
