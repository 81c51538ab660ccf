"""Pseudonymous keys: salted hashes that stand for subjects and runs everywhere but in the one file of ids."""

import hashlib
import hmac
import secrets

HEX_DIGITS = 16


def new_salt() -> str:
    """A random salt, 32 hex digits."""
    return secrets.token_hex(16)


def salt_id(salt: str) -> str:
    """A public name of the salt: keys of two stores may be compared where it is equal."""
    return _digest(salt, "salt")


def subject_key(salt: str, cohort: str, subject: str) -> str:
    """Key of a subject of a cohort (`s` and 16 hex digits); the subject id counts with or without `sub-`."""
    return "s" + _digest(salt, "subject", cohort, bare_subject(subject))


def run_key(salt: str, cohort: str, subject: str, session: str, task: str, run: str) -> str:
    """Key of a run (`r` and 16 hex digits)."""
    return "r" + _digest(salt, "run", cohort, bare_subject(subject), session, task, run)


def file_key(salt: str, relative: str) -> str:
    """Key of a file whose run cannot be told (`f` and 16 hex digits)."""
    return "f" + _digest(salt, "file", relative)


def bare_subject(subject: str) -> str:
    """A subject id without the prefix `sub-` of BIDS."""
    return subject.strip().removeprefix("sub-")


def _digest(salt: str, *parts: str) -> str:
    message = "\0".join(parts).encode("utf-8")
    return hmac.new(salt.encode("utf-8"), message, hashlib.sha256).hexdigest()[:HEX_DIGITS]
