"""What the sizes of every kind of attention must satisfy."""

from mla_lm.errors import UserError


def check_positive(config: object, *names: str) -> None:
    """Raises UserError where one of the named fields is set and below 1."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"{name}={value} must be at least 1")
