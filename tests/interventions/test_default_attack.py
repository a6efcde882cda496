"""The default attack is new; what older runs asked for is still what it was."""

from __future__ import annotations

import tiny

from auditgap.audits.latent.audit import LATENT
from auditgap.audits.latent.config import LatentConfig
from auditgap.audits.latent.plan import make_plan

#: What an older run's `run.json` holds of its attack, and its cells' settings.
OLD = {"models": ["m"], "steps": 10, "restarts": 1, "iterate": "last", "target": "Sure, here is"}
OLD_SETTINGS = {
    *("dtype", "chat_template", "max_new_tokens", "target", "reward", "judge", "coherence"),
    *("steps", "step_share", "restarts", "iterate", "compile", "draws", "untargeted_tokens"),
    "seed",
}


def test_an_older_config_means_the_papers_attack():
    config = LatentConfig(**{**LatentConfig.unwritten, **OLD})
    assert config.pgd.schedule == "constant"
    written = config.model_dump(mode="json")
    assert "schedule" not in written and written["iterate"] == "last"
    assert LatentConfig(**{**LatentConfig.unwritten, **written}) == config


def test_a_default_config_is_written_whole():
    config = LatentConfig(models=("m",))
    written = config.model_dump(mode="json")
    assert written["schedule"] == "decreasing"
    assert LatentConfig(**{**LatentConfig.unwritten, **written}) == config


def test_cells_of_the_papers_attack_keep_their_description(tmp_path):
    model = str(tiny.save("llama", tmp_path / "model"))
    asked = {"models": model, "layers": "0", "limit": 2, "judge": "keyword", "reward": "margin"}
    asked["confirm"] = "none"  # nobody looked twice

    def settings(**changes: str | bool) -> dict:
        plan = make_plan(LATENT.read(None, {**asked, **changes})[0])
        return dict(plan.groups[0].cells[0].settings)

    paper = settings(
        schedule="constant", iterate="last", target="Sure, here is", strip_target=False
    )
    assert set(paper) == OLD_SETTINGS
    default = settings()
    assert {k for k in {*paper, *default} if paper.get(k) != default.get(k)} == {
        "schedule",
        "iterate",
        "target",
        "openings",
    }
    assert default["reward"] == paper["reward"], "a reward's opening has no topic"
