"""One S3 server for all tests of this folder; each test has a prefix of its own."""

from collections.abc import Iterator

import pytest

from helpers.stores.s3_server import ENVIRONMENT, S3Server, s3_server


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture
def aws(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The server as a user's environment names it."""
    for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": s3.url}.items():
        monkeypatch.setenv(name, value)
    return s3
