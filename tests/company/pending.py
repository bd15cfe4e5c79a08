"""What is not followed or refused yet. A test that shows it is expected to fail, and the state machine leaves it out."""

PENDING: dict[str, str] = {
    "default device": "state is created on the default device",
}
