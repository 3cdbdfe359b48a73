"""Secrets: how they are known, and how they are kept out of what runs write down. Standard library only."""

from __future__ import annotations

import functools
import logging
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from adaptax.config import UserError

MASK = "***"
MIN_LENGTH = 8  # of an environment variable's value: a shorter one would be found everywhere

_SECRET_NAME = re.compile(
    r"(?:TOKEN|SECRETS?|PASSWORD|PASSWD|PASSPHRASE|(?:API|ACCESS|PRIVATE)_?KEY|CREDENTIALS?)(?![A-Z])"
)
_OTHER_NAME = re.compile(r"(?:FILE|PATH|DIR|FOLDER|NAME|URL|TYPE)$|(?:^|_)(?:BOS|EOS|PAD|UNK)_TOKEN$")
_PLAIN_PATH = re.compile(r"(?:~|\.\.?)?(?:/[\w.@ -]{1,30})+/?|[\w./ -]+\.(?:json|pem|key|crt|txt|toml|ya?ml)")

# What secrets of well-known kinds look like. Text of the first group, if there is one, is no secret and stays.
_LOOKS: dict[str, re.Pattern[str]] = {
    "a private key": re.compile(
        r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY.*?(?:-----END [A-Z0-9 ]{0,40}PRIVATE KEY[A-Z ]{0,10}-----|\Z)", re.S
    ),
    "a password in a URL": re.compile(r"(://[^\s/:@]*:)(?!\*{3}@|\$?\{|%[(s])[^\s/\"'<>]+(?=@)"),
    "a Hugging Face token": re.compile(
        r"(?<![A-Za-z0-9])(?:hf_(?:[a-z]{2,8}_)?|api_org_)[A-Za-z0-9]{16,}[\w-]*(?:\.[\w-]{8,})*"
    ),
    "an API key (sk-...)": re.compile(
        r"(?<![A-Za-z0-9])sk-(?:(?:admin|ant|lf|or|proj|svcacct)-[\w-]{20,}|[A-Za-z0-9]{20,})"
    ),
    "a GitHub token": re.compile(r"(?<![A-Za-z0-9])(?:gh[oprsu]_[A-Za-z0-9]{16,}|github_pat_\w{16,})"),
    "a GitLab token": re.compile(r"(?<![A-Za-z0-9])glpat-[\w-]{16,}"),
    "an AWS access key": re.compile(r"(?<![A-Za-z0-9])(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])"),
    "a Google API key": re.compile(r"(?<![A-Za-z0-9])AIza[\w-]{35}"),
    "a Slack token": re.compile(r"(?<![A-Za-z0-9])xox[a-z]-[\w-]{10,}"),
    "a web token (JWT)": re.compile(r"(?<![\w-])eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{10,}"),
    "a bearer token": re.compile(r"(\b(?i:bearer) )(?=[\w.~+/-]*\d)[\w.~+/-]{16,}=*"),
}


@functools.lru_cache(1024)  # the environment is looked through for every text
def is_secret_name(name: str) -> bool:
    """Whether an environment variable or a key of that name holds a secret: ``HF_TOKEN``, ``model.api_key``."""
    words = re.sub(r"\W+", "_", name).upper()
    return bool(_SECRET_NAME.search(words)) and not _OTHER_NAME.search(words)


def find_secret(text: str) -> str | None:
    """What kind of secret a text holds (``the value of HF_TOKEN``, ``a Hugging Face token``); None for none."""
    for value, name in _read_environment().items():
        if value in text:
            return f"the value of {name}"
    return next((kind for kind, look in _LOOKS.items() if look.search(text)), None)


def redact(text: str) -> str:
    """The text with ``***`` in place of every secret."""
    return _hide(text, _read_environment())


def check_no_secrets(values: Any, where: str = "") -> None:
    """Looks through nested plain values, keys included.

    Raises:
      UserError: naming the dotted key and the kind of secret, but not the secret.
    """
    if isinstance(values, Mapping):
        for key, value in values.items():
            check_no_secrets(str(key), f"a key in {where or 'the configuration'}")
            check_no_secrets(value, f"{where}.{key}" if where else str(key))
    elif isinstance(values, list | tuple):
        for place, value in enumerate(values):
            check_no_secrets(value, f"{where}[{place}]")
    elif isinstance(values, str) and (kind := find_secret(values)):
        raise UserError(
            f"{where or 'the configuration'} holds {kind}, and runs write their configuration down: take it out; "
            "secrets belong in the environment, such as HF_TOKEN, where programs read them themselves"
        )


class SecretFilter(logging.Filter):
    """Puts ``***`` in place of secrets in all of a record's texts.

    It belongs on handlers: a logger's filters do not see what comes from the loggers below it. Variables that were set
    when it was made stay known to it, those that are set later are noticed.
    """

    def __init__(self, name: str = ""):
        super().__init__(name)
        self._known = _read_environment()

    def filter(self, record: logging.LogRecord) -> bool:
        """Changes nothing where no secret is; else arguments go into the message, and a traceback becomes text."""
        self._known |= _read_environment()
        hide = functools.partial(_hide, secrets=self._known)
        _hide_in_message(record, hide)
        _hide_in_traceback(record, hide)
        for attribute, value in list(vars(record).items()):  # what ``extra`` brought, too
            if isinstance(value, str) and (clean := hide(value)) != value:
                setattr(record, attribute, clean)
        return bool(super().filter(record))


def _hide_in_message(record: logging.LogRecord, hide: Callable[[str], str]) -> None:
    arguments = record.args.values() if isinstance(record.args, Mapping) else record.args or ()
    try:
        message = record.getMessage()
    except Exception as error:  # a mistake in the call: what logging would print of it is not looked through
        words = record.msg if isinstance(record.msg, str) else type(record.msg).__name__
        record.msg, record.args = f"{words} ({type(error).__name__}: its arguments do not fit)", ()
        return
    if any(hide(text) != text for text in (message, *(a for a in arguments if isinstance(a, str)))):
        record.msg, record.args = hide(message), ()


def _hide_in_traceback(record: logging.LogRecord, hide: Callable[[str], str]) -> None:
    """Handlers that draw tracebacks themselves get none with a secret in it, but its text."""
    if not isinstance(record.exc_info, tuple) or not record.exc_info[0]:
        return
    for text in (record.exc_text, logging.Formatter().formatException(record.exc_info)):
        if text and hide(text) != text:
            record.exc_text, record.exc_info = hide(text), None
            return


def _hide(text: str, secrets: Mapping[str, str]) -> str:
    for value in sorted(secrets, key=len, reverse=True):  # one may be a part of another
        text = text.replace(value, MASK)
    for look in _LOOKS.values():
        text = look.sub(rf"\g<1>{MASK}" if look.groups else MASK, text)
    return text


def _read_environment() -> dict[str, str]:
    """Secret values of environment variables -> the variable's name."""
    secrets: dict[str, str] = {}
    for name, value in os.environ.items():
        value = value.strip()
        if len(value) >= MIN_LENGTH and is_secret_name(name) and not _PLAIN_PATH.fullmatch(value):
            secrets.setdefault(value, name)
    return secrets
