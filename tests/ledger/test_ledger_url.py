"""Passwords and TLS: a real server with a password, behind real TLS; every mistake is one sentence without a secret."""

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from megatron_distkv.launch.commands import free_port

from megatron_distkv.errors import UserError
from megatron_distkv.ledger.embedded_server import EmbeddedServer
from megatron_distkv.ledger.opening import open_ledger
from megatron_distkv.ledger.url import shown, warning_about
from megatron_distkv.rblock import InstanceId
from tests.ledger.tls_server import TlsTerminator, make_authority, make_certificate

PASSWORD = "open-sesame"
needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="certificates are made with openssl")


class TlsLedger:
    def __init__(self, directory: Path, socket: Path) -> None:
        self.authority = make_authority(directory, "authority")
        self.stranger = make_authority(directory, "stranger")
        self.client = make_certificate(directory, self.authority, "client")
        server = make_certificate(directory, self.authority, "server")
        self.one_sided = TlsTerminator(socket, server)
        self.two_sided = TlsTerminator(socket, server, self.authority)

    def url(self, authority: Path | None, *, password: str = PASSWORD, host: str = "localhost", more: str = "") -> str:
        trust = f"ssl_ca_certs={authority}&" if authority else ""
        return f"rediss://:{password}@{host}:{self.one_sided.port}/0?{trust}{more}"


@pytest.fixture(scope="module")
def locked() -> Iterator[EmbeddedServer]:
    with EmbeddedServer(password=PASSWORD) as running:
        yield running


@pytest.fixture(scope="module")
def tls(locked: EmbeddedServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsLedger]:
    ledger = TlsLedger(tmp_path_factory.mktemp("tls"), Path(urlsplit(locked.url).path))
    yield ledger
    ledger.one_sided.close()
    ledger.two_sided.close()


def sentence_for(url: str) -> str:
    with pytest.raises(UserError) as caught:
        open_ledger(url, "p")
    said = str(caught.value)
    assert "\n" not in said
    assert PASSWORD not in said
    return said


def assert_works(url: str) -> None:
    ledger = open_ledger(url, "p")
    registration = ledger.register(InstanceId("a"), "x", 4, 0, 5.0)
    assert ledger.snapshot().instances[0].epoch == registration.epoch
    ledger.close()


@needs_openssl
def test_a_ledger_behind_tls_with_a_password_is_used(tls: TlsLedger) -> None:
    assert_works(tls.url(tls.authority))


@needs_openssl
def test_a_ledger_that_wants_a_clients_certificate_gets_it(tls: TlsLedger) -> None:
    mine = f"ssl_certfile={tls.client}&ssl_keyfile={tls.client.with_suffix('.key')}"
    url = tls.url(tls.authority, more=mine).replace(str(tls.one_sided.port), str(tls.two_sided.port))
    assert_works(url)
    sentence_for(url.replace(mine, ""))


@needs_openssl
def test_a_certificate_of_a_stranger_is_one_sentence(tls: TlsLedger) -> None:
    for authority in (tls.stranger, None):
        said = sentence_for(tls.url(authority))
        assert "shows a certificate that cannot be trusted" in said
        assert "ssl_ca_certs=FILE" in said


@needs_openssl
def test_a_certificate_for_another_host_is_one_sentence(tls: TlsLedger) -> None:
    assert "cannot be trusted (IP address mismatch" in sentence_for(tls.url(tls.authority, host="127.0.0.1"))


@needs_openssl
def test_mistakes_in_a_tls_url_are_one_sentence(tls: TlsLedger) -> None:
    assert "certificate file that does not exist" in sentence_for(tls.url(Path("/nowhere/ca.pem")))
    assert "refuses the password" in sentence_for(tls.url(tls.authority, password="wrong"))
    assert "ssl_fancy" in sentence_for(tls.url(tls.authority, more="ssl_fancy=1"))
    assert "no ledger server answers" in sentence_for(tls.url(None).replace("rediss://", "redis://"))


def test_tls_to_a_server_without_it_is_one_sentence() -> None:
    with EmbeddedServer(port=free_port()) as plain:
        assert "no ledger server answers over TLS" in sentence_for(plain.tcp_url.replace("redis://", "rediss://"))
        assert "ssl_fancy" in sentence_for(plain.tcp_url + "?ssl_fancy=1")


def test_a_password_is_asked_for_and_accepted(locked: EmbeddedServer) -> None:
    assert_works(locked.url)
    assert "refuses the password" in sentence_for(locked.url.replace(PASSWORD, "wrong"))
    assert "wants a password" in sentence_for(locked.url.replace(f":{PASSWORD}@", ""))


@pytest.mark.parametrize(
    "url",
    [
        f"foo://:{PASSWORD}@host", f"redis://:{PASSWORD}@[::1", f"redis://:{PASSWORD}@localhost:99999",
        f"redis://:{PASSWORD}@localhost:1/?db=x", f"redis://localhost:1/0?password={PASSWORD}",
    ],
)  # fmt: skip
def test_a_url_that_cannot_be_used_is_one_sentence_without_its_password(url: str) -> None:
    sentence_for(url)


def test_what_is_shown_of_a_url() -> None:
    assert shown(f"rediss://me:{PASSWORD}@h:1/0?ssl_ca_certs=/a.pem&ssl_password=x") == (
        "rediss://h:1/0?ssl_ca_certs=/a.pem"
    )
    assert shown(f"unix://:{PASSWORD}@/run/x.sock") == "unix:///run/x.sock"


def test_an_operator_is_warned_of_what_others_can_read(
    locked: EmbeddedServer, caplog: pytest.LogCaptureFixture
) -> None:
    assert warning_about("redis://ledger.example:6379/0") is not None
    assert warning_about("rediss://ledger.example:6379/0?ssl_cert_reqs=none") is not None
    for harmless in ("redis://127.0.0.1:1/0", "redis://localhost", "rediss://ledger.example:1/0", "unix:///x"):
        assert warning_about(harmless) is None
    with caplog.at_level(logging.WARNING, "distkv"):
        open_ledger(locked.url, "p").close()
    assert caplog.records == []
