"""`loraplex keys new`: the printed key is the one whose hash the printed entry has."""

import re
from pathlib import Path

import pytest

from loraplex.engine.tenants.api_key import key_hash
from loraplex.engine.tenants.key_file import read_key_file
from loraplex.entrypoints.cli.main import main


@pytest.mark.parametrize(
    ("tenant", "owner"), [("acme", "acme"), ("no", "no"), ("Zoë: 1", "Zoë: 1"), ("admin", "")]
)
def test_the_printed_entry_accepts_the_printed_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tenant: str, owner: str
) -> None:
    assert main(["keys", "new", "--tenant", tenant]) == 0
    printed = capsys.readouterr().out
    (key,) = re.findall(r"^  (lpx-\S{43})$", printed, re.MULTILINE)
    (tmp_path / "keys.yaml").write_text(printed[printed.index("tenants:") :])
    assert read_key_file(str(tmp_path / "keys.yaml")).key_owners == {key_hash(key): owner}
    assert printed.count(key) == 1


def test_a_bad_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "new", "--tenant", "a\nb"]) == 2
    assert "--tenant: a tenant's name has 1 to 256 printable" in capsys.readouterr().err
