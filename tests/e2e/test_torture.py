"""All attacks together, beside honest clients of one server; three minutes of it by hand."""

from pathlib import Path

import pytest

from helpers.torture.attacks import ATTACKS
from helpers.torture.run import MAX_GROWTH, NUM_CLIENTS, torture

pytestmark = [pytest.mark.e2e, pytest.mark.long]


def test_honest_clients_get_their_answers_beside_all_attacks(tmp_path: Path) -> None:
    report = torture(tmp_path, seconds=20.0, idle_s=3.0)
    print(report.summary())
    assert not report.wrong, report.wrong[:5]
    assert len(report.attacked) + len(report.cut) >= NUM_CLIENTS
    assert report.num_kills
    assert set(report.refused) <= {"connection_lost", "engine_dead", "queue_full"}
    assert all(report.rounds[attack.__name__] for attack in ATTACKS)
    assert max(report.growth.values()) < MAX_GROWTH, report.growth
