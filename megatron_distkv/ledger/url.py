"""What a person is told about a ledger URL: never its secrets, and one sentence for each way that it cannot be used."""

import ipaddress
from urllib.parse import parse_qsl, urlencode, urlsplit

import redis

from megatron_distkv.errors import UserError


def shown(url: str) -> str:
    """The URL without user, password and query values that hold one; a URL that cannot be read shows its scheme."""
    try:
        parts = urlsplit(url)
        options = [(key, value) for key, value in parse_qsl(parts.query) if "password" not in key]
    except ValueError:
        return f"{url.partition('://')[0]}://..."
    host = parts.netloc.rpartition("@")[2]
    query = f"?{urlencode(options, safe='/')}" if options else ""
    return f"{parts.scheme}://{host}{parts.path}{query}"


def warning_about(url: str) -> str | None:
    """What an operator should know of a URL that works: passwords and debts that others could read."""
    parts = urlsplit(url)
    if parts.scheme == "rediss" and dict(parse_qsl(parts.query)).get("ssl_cert_reqs") == "none":
        return f"the ledger at {shown(url)} is not asked for a certificate: anybody in between can be the ledger"
    if parts.scheme == "redis" and not _is_this_host(parts.hostname or "localhost"):
        return (
            f"the ledger at {shown(url)} is asked without TLS: others can read and change what it says; use rediss://"
        )
    return None


def explain(url: str, error: Exception) -> UserError:
    """The sentence for an error of the first contact."""
    where, text = shown(url), str(error)
    if isinstance(error, redis.AuthenticationError):
        has_none = "Authentication required" in text or "NOAUTH" in text
        return UserError(
            f"the ledger at {where} wants a password: put it into the URL as {urlsplit(url).scheme}://:PASSWORD@..."
            if has_none
            else f"the ledger at {where} refuses the password: {text}"
        )
    if "CERTIFICATE_VERIFY_FAILED" in text:
        reason = text.partition("certificate verify failed: ")[2].partition(" (_ssl")[0] or text
        return UserError(
            f"the ledger at {where} shows a certificate that cannot be trusted ({reason}); "
            "ssl_ca_certs=FILE in the URL names the authority to trust"
        )
    if "[SSL" in text:
        return UserError(f"the ledger at {where} does not speak TLS as expected: {text.partition('[SSL')[2]}")
    if isinstance(error, redis.RedisError) and "No such file" in text and "ssl_" in urlsplit(url).query:
        return UserError(f"the ledger URL {where} names a certificate file that does not exist")
    over_tls = "over TLS " if url.startswith("rediss:") else ""
    if isinstance(error, redis.RedisError):
        return UserError(
            f"no ledger server answers {over_tls}at {where} ({text}); "
            "start Redis or Valkey there, or use embedded:// with `distkv up`"
        )
    return UserError(f"the ledger URL {where} cannot be used: {text}")


def _is_this_host(name: str) -> bool:
    try:
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
