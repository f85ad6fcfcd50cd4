import pytest

from loraplex.memory.config import MemoryConfig


def test_zero_host_bytes_is_no_host_cache() -> None:
    assert MemoryConfig(adapter_host_bytes=0).adapter_host_bytes == 0


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"adapter_host_bytes": -1}, "adapter_host_bytes must not be negative"),
        ({"max_lora_rank": 0}, "max_lora_rank must be positive"),
    ],
)
def test_bad_options_are_refused(options: dict[str, int | str], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        MemoryConfig(**options)  # type: ignore[arg-type]
