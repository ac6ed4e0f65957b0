"""From a place as the user writes it (path, URI, path with a file system) to the files there."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit, urlunsplit

from raylight.contract.config import mask_uri
from raylight.contract.errors import InvalidArguments
from raylight.storage.local_files import LocalFiles
from raylight.storage.remote_files import NUM_TRIES_OF_A_PART, RemoteFiles
from raylight.storage.retry import Backoff

if TYPE_CHECKING:
    from pyarrow import fs

SCHEMES = ("file", "s3", "gs", "gcs", "hdfs", "viewfs", "abfs", "abfss")
_S3_TEXT_OPTIONS = ("region", "scheme", "endpoint_override", "tls_ca_file_path")
_S3_SWITCHES = ("allow_bucket_creation", "allow_bucket_deletion", "force_virtual_addressing", "anonymous")
_S3_OPTIONS = _S3_TEXT_OPTIONS + _S3_SWITCHES


@dataclass(frozen=True, slots=True)
class Location:
    """`root` is the path as `files` wants it; `shown` + "/" + a relative path + `query` is how a person writes it.

    `shown` and `query` hold no password: keys belong into the environment, not into a URI that logs repeat.
    """

    files: LocalFiles | RemoteFiles
    root: str
    shown: str
    query: str = ""


def locate(place: str | os.PathLike[str], filesystem: Any, backoff: Backoff) -> Location:
    """The location of `place`, without touching storage. Raises InvalidArguments if raylight cannot open it."""
    text = os.fspath(place)
    if not isinstance(text, str) or not text.strip() or "\0" in text:
        raise InvalidArguments(
            f"storage_path={place!r} is not a path: give a folder, or a URI such as s3://bucket/folder."
        )
    if filesystem is not None:
        return _locate_on(filesystem, text, backoff)
    scheme = _scheme(text)
    if scheme is None:
        return _local(text)
    if scheme == "file":
        return _local(unquote(urlsplit(text).path))
    if scheme == "s3":
        return _locate_s3(text, backoff)
    return _locate_uri(text, scheme, backoff)


def _scheme(text: str) -> str | None:
    """The scheme of a URI; None for a path."""
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):(/+)", text)
    if found is None:
        return None
    scheme, slashes = found[1].lower(), found[2]
    if scheme in SCHEMES and (len(slashes) >= 2 or scheme == "file"):
        return scheme
    if len(slashes) < 2 and scheme not in SCHEMES:
        return None  # a path may hold a colon
    rest = text[found.end() :]
    close = difflib.get_close_matches(scheme, SCHEMES, n=1, cutoff=0.5)
    nearest = mask_uri(f" Did you mean {close[0]}://{rest}?") if close else ""
    raise InvalidArguments(
        f"storage_path={mask_uri(text)!r}: {found[0]} is not a kind of storage that raylight knows.{nearest} "
        f"Known are plain paths and {', '.join(f'{name}://' for name in SCHEMES)}; "
        "for any other give a path and storage_filesystem=, a pyarrow.fs file system."
    )


def _local(path: str) -> Location:
    root = os.path.abspath(os.path.expanduser(path))
    return Location(LocalFiles(), root, root)


def _locate_s3(text: str, backoff: Backoff) -> Location:
    parts = urlsplit(text)
    bucket = parts.netloc.rpartition("@")[2]
    if not bucket:
        raise InvalidArguments(f"storage_path={mask_uri(text)!r} names no bucket: write s3://bucket/folder.")
    options: dict[str, Any] = {}
    mistakes = []
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        if name not in _S3_OPTIONS:
            close = difflib.get_close_matches(name, _S3_OPTIONS, n=1)
            mistakes.append(
                f"storage_path: S3 has no option {name!r}"
                + (f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(_S3_OPTIONS)}.")
            )
        options[name] = value.lower() in ("1", "true", "yes") if name in _S3_SWITCHES else value
    if mistakes:
        raise InvalidArguments(mistakes)
    if parts.username:
        options["access_key"] = unquote(parts.username)
        options["secret_key"] = unquote(parts.password or "")
    path = unquote(parts.path).strip("/")
    files = RemoteFiles(partial(_open_s3, bucket, options), backoff, "s3://")
    shown = f"s3://{bucket}/{quote(path)}".rstrip("/")
    return Location(files, f"{bucket}/{path}".rstrip("/"), shown, f"?{parts.query}" if parts.query else "")


def _open_s3(bucket: str, options: dict[str, Any], streaming: bool) -> fs.FileSystem:
    from pyarrow import fs

    options = dict(options)
    endpoint = options.get("endpoint_override", "")
    if "://" in endpoint:
        options["scheme"], options["endpoint_override"] = endpoint.split("://", 1)
    if "region" not in options and not endpoint and not os.environ.get("AWS_ENDPOINT_URL"):
        options["region"] = fs.resolve_s3_region(bucket)
    # Single requests are tried again by raylight, which says so in the log. Streams are opened at once, so that a
    # failed stream can never create the file after all; plain files are not, so that they are one request.
    tries = NUM_TRIES_OF_A_PART if streaming else 1
    return fs.S3FileSystem(
        **options,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=tries),
        allow_delayed_open=not streaming,
    )


def _locate_uri(text: str, scheme: str, backoff: Backoff) -> Location:
    parts = urlsplit(text)
    path = unquote(parts.path).strip("/")
    user, _, host = parts.netloc.rpartition("@")
    if scheme.startswith("abfs"):
        if not user or ":" in user or not host:
            raise InvalidArguments(
                f"storage_path: write {scheme}://container@account.dfs.core.windows.net/folder. With an account key, "
                'give storage_path="container/folder" and storage_filesystem=pyarrow.fs.AzureFileSystem(...).'
            )
        root = f"{user}/{path}".rstrip("/")
    elif scheme in ("hdfs", "viewfs"):
        root = f"/{path}"
    elif host:
        root = f"{host}/{path}".rstrip("/")
    else:
        raise InvalidArguments(f"storage_path={mask_uri(text)!r} names no bucket: write {scheme}://bucket/folder.")
    opened = partial(_open_uri, urlunsplit((scheme, parts.netloc, "", parts.query, "")))
    # The name of an hdfs user or an abfs container is no secret; a password is, and so are some options.
    is_shown = user and (scheme not in ("gs", "gcs") or user == "anonymous")
    authority = f"{user.partition(':')[0]}@{host}" if is_shown else host
    files = RemoteFiles(opened, backoff, f"{scheme}://" + (authority if root.startswith("/") else ""))
    shown = f"{scheme}://{authority}/{quote(path)}".rstrip("/")
    query = mask_uri(f"{scheme}://?{parts.query}").partition("?")[2]
    return Location(files, root, shown, f"?{query}" if query else "")


def _open_uri(uri: str, streaming: bool) -> fs.FileSystem:
    from pyarrow import fs

    return fs.FileSystem.from_uri(uri)[0]


def _locate_on(filesystem: Any, path: str, backoff: Backoff) -> Location:
    """A path on a file system that the caller made; a URI of the same place is taken too."""
    from pyarrow import fs

    if not isinstance(filesystem, fs.FileSystem):
        raise InvalidArguments(
            f"storage_filesystem={filesystem!r} is not a pyarrow.fs.FileSystem. An fsspec file system becomes one by "
            "pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(it))."
        )
    base = ""
    while isinstance(filesystem, fs.SubTreeFileSystem):
        base = f"{filesystem.base_path.rstrip('/')}/{base}"
        filesystem = filesystem.base_fs
    kind = re.sub(r"\('(\w+)'.*\)", r"\1", filesystem.type_name.split("::")[-1])  # fsspec+('s3', 's3a')
    prefix = f"{kind}://"
    if path.startswith(prefix):  # as in a path copied from a result
        path = unquote(path.removeprefix(prefix).partition("?")[0])
    elif (scheme := _scheme(path)) is not None:
        path = path.split("://", 1)[1].split("?")[0] if scheme != "file" else unquote(urlsplit(path).path)
    if not path.startswith(base):
        path = base + path.lstrip("/")
    if isinstance(filesystem, fs.LocalFileSystem):
        return _local(path)
    if kind in ("s3", "gcs", "abfs"):
        path = path.strip("/")
    root = path.rstrip("/") or "/"
    opened: Callable[[bool], Any] = partial(_return_it, filesystem)
    return Location(RemoteFiles(opened, backoff, prefix), root, prefix + quote(root))


def _return_it(filesystem: Any, streaming: bool) -> Any:
    return filesystem
