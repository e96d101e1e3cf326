"""What the names of keys cost: `app/keys.py`. Which keys there are is in test_docs."""

from app.keys import Keys

KEYS = Keys("mollifier", 16)


def test_the_keys_of_an_environment_are_remembered() -> None:
    assert KEYS.environment("env_1") is KEYS.environment("env_1")


def test_long_names_are_not_for_anybody_can_make_up_any_number_of_them() -> None:
    name = "n" * 2_000
    assert KEYS.environment(name) is not KEYS.environment(name)
    assert KEYS.environment(name) == KEYS.environment(name)
