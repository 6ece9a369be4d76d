"""Pairs and settings that were accepted and had no effect, or another one, until they were read
a second time."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from experiments import config, sweep

ROOT = Path(__file__).parents[1]
TARGETS = ["first", "second"]
config.register()


def settings(*words: str) -> config.Settings:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return config.settings_of(compose("config", list(words)))


@pytest.mark.parametrize(
    "word", ["rank_pattern={q: 2, l.0.up: 6}", "+rank_pattern={q: 2, l.0.up: 6}"]
)
def test_a_pattern_can_be_typed(word: str) -> None:
    assert settings(sweep._named(word)).rank_pattern == {"q": 2, "l.0.up": 6}
    assert settings(sweep._named("alpha_pattern.q=3")).alpha_pattern == {"q": 3.0}
