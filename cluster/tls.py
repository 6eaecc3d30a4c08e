"""TLS of the ports that clients and gateways connect to: certificates from files, read again when the files change.

Every handshake looks at the files' times; nothing has to be restarted or signalled. Files that do not fit together,
as in the middle of a rotation, leave the certificate that was good, and are logged once.
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from threading import Lock

import grpc

from cluster.config import TlsFiles
from cluster.errors import ConfigError

logger = logging.getLogger(__name__)

LINK_NAME = "mull-router"
"""The name in the certificates of Routers: gateways find them by addresses that no certificate can know."""


@dataclass(frozen=True, kw_only=True)
class _Loaded:
    """What one look at the files gave."""

    stamp: tuple[tuple[int, int, int], ...]
    cert: bytes
    key: bytes
    ca: bytes | None
    context: ssl.SSLContext

    @property
    def pair(self) -> tuple[bytes, bytes]:
        return self.key, self.cert


class ServerCertificates:
    """The certificates of a server, as they are now. Safe to use from several threads: gRPC asks from its own."""

    def __init__(self, files: TlsFiles, on_failed: Callable[[str], None] = logger.error) -> None:
        """Raises ConfigError for files that cannot be used: a server must not start with them."""
        self._files = files
        self._on_failed = on_failed
        self._lock = Lock()
        self._failed_stamp: tuple[tuple[int, int, int], ...] | None = None
        self._loaded = _load(files)

    def current_chain(self) -> bytes:
        """The chain that the next handshake shows."""
        return self._current().cert

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """For `add_secure_port`; each handshake asks for the certificates again."""

        def fetch() -> grpc.ServerCertificateConfiguration:
            now = self._current()
            return grpc.ssl_server_certificate_configuration([now.pair], now.ca)

        return grpc.dynamic_ssl_server_credentials(fetch(), fetch, self._files.ca is not None)

    def ssl_context(self) -> ssl.SSLContext:
        """For asyncio servers; each handshake goes on in the context of the certificates as they are then."""
        context = _load(self._files).context

        def choose(connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
            connection.context = self._current().context

        context.sni_callback = choose
        return context

    def _current(self) -> _Loaded:
        with self._lock:
            stamp = _stamp(self._files)
            if stamp in (self._loaded.stamp, self._failed_stamp):
                return self._loaded
            try:
                self._loaded, self._failed_stamp = _load(self._files), None
            except ConfigError as error:
                self._failed_stamp = stamp
                self._on_failed(f"{error}; the certificate from before stays in use")
            return self._loaded


def link_server_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """Of a Router: only gateways whose certificate `files.ca` has signed get in. Raises ConfigError."""
    assert files.ca is not None, "the config checks it"
    return ServerCertificates(files).grpc_credentials()


def link_channel_credentials(files: TlsFiles) -> grpc.ChannelCredentials:
    """Of a gateway towards Routers, read now. Raises ConfigError."""
    loaded = _load(files)
    return grpc.ssl_channel_credentials(loaded.ca, loaded.key, loaded.cert)


def certificate_ends(ports: ServerCertificates | None, link: TlsFiles | None) -> dict[tuple[str, ...], float]:
    """When the certificates in use end, in seconds since 1970, by what they are for; those that can be read."""
    ends: dict[tuple[str, ...], float] = {}
    if ports is not None:
        ends["ports",] = _ends_at(ports.current_chain())
    if link is not None:
        with suppress(OSError, ValueError):
            ends["link",] = _ends_at(link.cert.read_bytes())
    return ends


def _ends_at(chain: bytes) -> float:
    from cryptography import x509

    return x509.load_pem_x509_certificate(chain).not_valid_after_utc.timestamp()


def _stamp(files: TlsFiles) -> tuple[tuple[int, int, int], ...]:
    """Changes whenever a file is written or replaced; a missing one is a change too."""
    stamps = []
    for file in (files.cert, files.key, files.ca):
        if file is None:
            continue
        try:
            stat = file.stat()
        except OSError:
            stamps.append((0, 0, 0))
        else:
            stamps.append((stat.st_mtime_ns, stat.st_ino, stat.st_size))
    return tuple(stamps)


def _load(files: TlsFiles) -> _Loaded:
    stamp = _stamp(files)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        cert, key = files.cert.read_bytes(), files.key.read_bytes()
        # An encrypted key would make OpenSSL ask at the terminal.
        context.load_cert_chain(files.cert, files.key, password=lambda: b"")
        ca = None if files.ca is None else files.ca.read_bytes()
        if files.ca is not None:
            context.load_verify_locations(files.ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except ssl.SSLError as error:
        raise ConfigError(
            f"{files.cert} and {files.key}: no certificate with its own, unencrypted key, or {files.ca} is no "
            f"certificate ({error.reason or error}); give PEM files that belong together"
        ) from error
    except OSError as error:
        raise ConfigError(f"{error.filename}: cannot be read ({error.strerror}); give PEM files") from error
    if _stamp(files) != stamp:
        raise ConfigError(f"{files.cert}: changed while it was read; it is read again")
    return _Loaded(stamp=stamp, cert=cert, key=key, ca=ca, context=context)
