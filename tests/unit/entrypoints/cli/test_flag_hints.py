"""Hints of a command about arguments that it does not know."""

from loraplex.entrypoints.cli.flag_hints import explain

KNOWN = ("--model", "--adapter", "--endpoint", "--http")


def test_the_value_of_an_unknown_flag_is_not_mentioned() -> None:
    text = explain(["--hots", "0.0.0.0", "--revision=main", "stray"], KNOWN)
    assert "0.0.0.0" not in text
    assert text.endswith("unrecognized argument stray")


def test_the_address_of_vllms_server_is_that_of_http() -> None:
    text = explain(["--host", "0.0.0.0", "--port", "8000"], KNOWN)
    assert text.count("use --http HOST:PORT for OpenAI's API") == 2
    assert text.count("unrecognized") == 2
