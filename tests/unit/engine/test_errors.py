import pytest

from loraplex.engine import errors


@pytest.mark.parametrize("name", ["ClientError", "AdapterError", "QueueFullError"])
def test_a_refused_request_is_a_value_error_as_in_vllm(name: str) -> None:
    with pytest.raises(ValueError, match="too long"):
        raise getattr(errors, name)("too long")
    assert isinstance(errors.client_error("prompt_too_long", "x"), ValueError)


def test_a_dead_engine_is_no_value_error() -> None:
    assert not issubclass(errors.EngineDeadError, ValueError)
