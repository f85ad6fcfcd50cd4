from loraplex.engine.processes.restart_policy import MAX_DEATHS, WINDOW_S, RestartPolicy


def test_deaths_in_a_row_wait_longer_and_then_are_too_many() -> None:
    policy = RestartPolicy()
    assert [policy.on_death(1.0 + i) for i in range(5)] == [0.0, 0.25, 0.5, 1.0, None]


def test_deaths_apart_are_forgotten() -> None:
    policy = RestartPolicy()
    for i in range(20):
        assert policy.on_death(i * WINDOW_S) == 0.0
    step = WINDOW_S / (MAX_DEATHS - 1)
    policy = RestartPolicy()
    assert all(policy.on_death(i * step) is not None for i in range(50))
    policy = RestartPolicy()
    shorter = [policy.on_death(i * step * 0.99) for i in range(MAX_DEATHS)]
    assert shorter[-1] is None and None not in shorter[:-1]
