"""The number of files that a process may have open."""

import resource


def raise_descriptor_limit() -> None:
    """Lets the process open as many files as the system allows.

    A frontend needs one for each client: without a free one libzmq accepts nobody for some 30 s. A
    scheduler needs two for each adapter that clients send as tensors.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
