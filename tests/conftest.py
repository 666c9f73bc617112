"""Being here makes pytest put the repository root on the path, so that tests can say `from tests.tiny import …`."""
