"""Receives what `auditgate send` posts, and verifies and parses it by Konnect's wire format alone.

    verify.py AUDITGATE DIRECTORY

DIRECTORY has the `signing-key.pem` and `jwks.json` of `auditgate keygen`. Events are made here, sent in each format by
the program AUDITGATE to a server of this process, and compared with what arrives. Nothing of the daemon is used: the
bytes that are signed are found here, and the fields are parsed here. Prints the number of events of each format; ends
with a traceback at the first difference.
"""

import base64
import gzip
import http.server
import json
import os
import pathlib
import random
import re
import subprocess
import sys
import threading

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

AUTHORIZATION = 'Splunk s3cr/et "token"='
HEADER = ["cef_version", "event_vendor", "event_product", "event_version", "event_class_id", "name", "severity"]
GENERATED = 300


# Verification


def decode_base64url(text: str, length: int) -> bytes:
    """Decodes base64url without padding, of exactly that many bytes and in its only spelling."""
    data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    assert len(data) == length and base64.urlsafe_b64encode(data).decode().rstrip("=") == text, text
    return data


def read_keys(path: pathlib.Path) -> list[Ed25519PublicKey]:
    keys = json.loads(path.read_text())["keys"]
    assert all((key["kty"], key["crv"], key["alg"]) == ("OKP", "Ed25519", "EdDSA") for key in keys), keys
    return [Ed25519PublicKey.from_public_bytes(decode_base64url(key["x"], 32)) for key in keys]


def is_signed(keys: list[Ed25519PublicKey], messages: list[bytes], signature: str) -> bool:
    for key in keys:
        for message in messages:
            try:
                key.verify(decode_base64url(signature, 64), message)
                return True
            except InvalidSignature:
                pass
    return False


def cut_cef(line: bytes) -> tuple[list[bytes], str]:
    """Returns what may be signed, and the signature."""
    message, signature = line.rsplit(b" sig=", 1)
    return [message], signature.decode("ascii")


def members(text: str, start: int) -> list[tuple[str, int, int, int]]:
    """Returns name, begin, begin of the value and end of each member of the object at `start`, which has no space
    between its tokens."""
    assert text[start] == "{"
    found, at = [], start + 1
    while text[at] != "}":
        begin = at
        name, at = json.JSONDecoder().raw_decode(text, at)
        assert text[at] == ":", text[at:]
        value = at + 1
        _, at = json.JSONDecoder().raw_decode(text, value)
        found.append((name, begin, value, at))
        if text[at] == ",":
            at += 1
            assert text[at] == '"', text[at:]
    return found


def cut_member(text: str, start: int) -> tuple[str, str]:
    """Returns the text without the member `sig` of the object at `start`, and its value."""
    ((_, begin, value, end),) = [member for member in members(text, start) if member[0] == "sig"]
    signature = json.loads(text[value:end])
    if text[begin - 1] == ",":
        begin -= 1
    elif text[end] == ",":
        end += 1
    return text[:begin] + text[end:], signature


def cut_json(line: bytes) -> tuple[list[bytes], str]:
    message, signature = cut_member(line.decode(), 0)
    return [message.encode()], signature


def cut_cps(line: bytes) -> tuple[list[bytes], str]:
    """Over the whole line, or over the inner object."""
    text = line.decode()
    prefix = '{"event":'
    assert text.startswith(prefix + "{"), text
    outer = members(text, 0)
    if any(name == "sig" for name, *_ in outer):
        message, signature = cut_member(text, 0)
        return [message.encode()], signature
    message, signature = cut_member(text, len(prefix))
    return [message.encode(), message[len(prefix) : -1].encode()], signature


# Parsing


def unescape(text: str, escapes: dict[str, str]) -> str:
    def character(match: re.Match[str]) -> str:
        return escapes[match[1]]

    return re.sub(r"\\(.)", character, text, flags=re.DOTALL)


def parse_cef(line: bytes) -> dict[str, str]:
    text = line.decode()
    event_ts, rest = text.split(" konghq.com CEF:", 1)
    header, extension = split_header(rest)
    fields = {"event_ts": event_ts}
    for name, value in zip(HEADER, header):
        fields[name] = unescape(value, {"|": "|", "\\": "\\"})
    # A key is behind a space, and its `=` is not escaped: no character of a key is a backslash.
    parts = re.split(r"(?:^| )([A-Za-z0-9_.,\[\]-]+)=", extension)
    assert parts[0] == "", parts
    for name, value in zip(parts[1::2], parts[2::2]):
        assert name not in fields, f"{name} occurs twice: {text!r}"
        fields[name] = unescape(value, {"=": "=", "\\": "\\", "n": "\n", "r": "\r"})
    return fields


def split_header(rest: str) -> tuple[list[str], str]:
    fields, begin, at = [], 0, 0
    while len(fields) < 7:
        if rest[at] == "\\":
            at += 2
            continue
        if rest[at] == "|":
            fields.append(rest[begin:at])
            begin = at + 1
        at += 1
    return fields, rest[begin:]


def number(spelled: str) -> tuple[str, str]:
    """A JSON number as it is spelled, which is equal to no text."""
    return ("number", spelled)


def parse_json(line: bytes) -> dict[str, object]:
    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        assert len(dict(pairs)) == len(pairs), pairs
        return dict(pairs)

    return json.loads(line, object_pairs_hook=unique, parse_int=number, parse_float=number)


def parse_cps(line: bytes) -> dict[str, object]:
    outer = parse_json(line)
    inner = outer.pop("event")
    assert set(outer) <= {"sig"}, outer
    return {**inner, **outer}


FORMATS = {"cef": (cut_cef, parse_cef), "json": (cut_json, parse_json), "cps": (cut_cps, parse_cps)}


# Events

PIECES = [
    "", " ", "  ", "a", "a=b", "=", "==", " sig=AAAA", " sig=" + "A" * 86, "sig=", " trace_id=1", " granted=true",
    " name=x", " rt=1 src=::1", "|", "\\", "\\\\", "\\=", "\\n", "\\|", "\n", "\r", "\r\n", "\t", '"', "'", "{", "}",
    ',"sig":"x"', '{"end":"1684270800","sig":"x"}', "CEF:0|", " CEF:0|a|b|c|d|e|0|", "Grüße", "日本語", "🦀",
    "e\u0301", "\u2028", "\u2029", "\u202e", "\u00a0", "\ufeff", "\ufffd", "\x00", "\x01", "\x1b[31m", "\x7f", "\x85",
    "%20", "</x>",
    "Mozilla/5.0 (Macintosh; Intel Mac OS X 10_15_7) AppleWebKit/537.36",
]  # fmt: skip
NUMBERS = ["9007199254740993", "18446744073709551616", "123456789012345678901234567890", "-1"]
JSON_VALUES = [
    "1e3", "-0.0", "123456789012345678901234567890.50", "null", "true", '{"sig":"in","a":[1,{"b":null}]}', "[]",
]  # fmt: skip


def string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def make(choices: random.Random, count: int, kind: int, texts: dict[str, str]) -> dict[str, str]:
    """Returns an event of one of Konnect's types: the name of each field, and its JSON."""
    name, more = [
        ("AUTHENTICATION_OUTCOME_SUCCESS", {"request": string(texts["request"]), "success": "true"}),
        ("Authz.usage", {"action": string("retrieve"), "granted": "false", "actor_id": string(texts["actor_id"])}),
        (
            "Ingress",
            {
                "request": string(texts["request"]),
                "act": '"GET"',
                "status": "200",
                "query": string(texts["query"]),
            },
        ),
    ][kind]
    return {
        "cef_version": "0",
        "event_ts": '"2023-05-19T00:03:39Z"',
        "event_vendor": string("Kong|Inc" if count % 5 == 0 else "KongInc"),
        "event_product": string("Kon\\nect" if count % 7 == 0 else "Konnect"),
        "event_version": '"1.0"',
        "event_class_id": string("a\\|b=c" if count % 3 == 0 else "konnect"),
        "name": string(name),
        "severity": str(choices.choice([0, 1, 6, 10])),
        "rt": str(1684454619000 + count),
        "src": '"2001:db8::7"',
        "org_id": '"b065b594-6afc-4658-9101-5d9cf3f36b7b"',
        "principal_id": '"87655c36-8d63-48fe-9a1e-53b28dfbc19b"',
        "principal_name": string(texts["principal_name"]),
        "trace_id": choices.choice([*NUMBERS[:3], string(str(count)), string("0" * 5 + str(count))]),
        "user_agent": string(texts["user_agent"]),
        "new_field": string(texts["new_field"]),
        **more,
    }


def make_all(format_name: str) -> list[dict[str, str]]:
    choices = random.Random(format_name)
    names = ["request", "query", "actor_id", "principal_name", "user_agent", "new_field"]
    # Each piece alone in each field, then mixtures.
    events = [make(choices, count, count % 3, dict.fromkeys(names, piece)) for count, piece in enumerate(PIECES)]
    for count in range(len(PIECES), len(PIECES) + GENERATED):
        texts = {name: "".join(choices.choices(PIECES, k=choices.randint(0, 5))) for name in names}
        events.append(make(choices, count, count % 3, texts))
    if format_name != "cef":
        for count, value in enumerate([*NUMBERS, *JSON_VALUES]):
            events.append({**make(choices, 10_000 + count, 0, dict.fromkeys(names, "x")), "other": value})
    return events


def write(event: dict[str, str]) -> str:
    return "{" + ",".join(f"{string(name)}:{value}" for name, value in event.items()) + "}"


def expected(event: dict[str, str], format_name: str) -> dict[str, object]:
    """Returns the fields that must arrive: in CEF all as text, in JSON and CPS with their documented types."""
    fields = parse_json(write(event).encode())
    for name, value in fields.items():
        if isinstance(value, tuple) and (format_name == "cef" or name in ("cef_version", "trace_id")):
            fields[name] = value[1]
        if isinstance(value, bool) and format_name == "cef":
            fields[name] = str(value).lower()
    return fields


# The receiver


class Receiver(http.server.ThreadingHTTPServer):
    """Keeps the lines that are posted to it, and answers with a receipt."""

    lines: list[bytes] = []


class Request(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        assert self.headers["Authorization"] == AUTHORIZATION, self.headers
        assert self.headers["Content-Type"] == "text/plain", self.headers
        assert self.headers["Content-Encoding"] == "application/gzip", self.headers
        lines = gzip.decompress(body).split(b"\n")
        assert lines.pop() == b""
        self.server.lines.extend(lines)
        receipt = json.dumps({"accepted": len(lines), "duplicates": 0, "quarantined": 0}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(receipt)))
        self.end_headers()
        self.wfile.write(receipt)

    def log_message(self, *_: object) -> None:
        pass


def send(auditgate: str, receiver: Receiver, arguments: list[str], events: str) -> list[bytes]:
    """Runs `auditgate send`, and returns the lines that it posted."""
    receiver.lines.clear()
    to = f"http://127.0.0.1:{receiver.server_address[1]}/konnect"
    command = [auditgate, "send", "--to", to, "--batch-events", "100", *arguments]
    environment = {**os.environ, "AUDITGATE_AUTHORIZATION": AUTHORIZATION}
    ended = subprocess.run(command, input=events.encode(), env=environment, capture_output=True, check=False)
    assert ended.returncode == 0, ended.stderr.decode()
    return list(receiver.lines)


def main() -> None:
    auditgate, directory = sys.argv[1], pathlib.Path(sys.argv[2])
    keys = read_keys(directory / "jwks.json")
    receiver = Receiver(("127.0.0.1", 0), Request)
    threading.Thread(target=receiver.serve_forever, daemon=True).start()
    for name, (cut, parse) in FORMATS.items():
        arguments = ["--key", str(directory / "signing-key.pem"), "--format", name]
        events = make_all(name)
        text = "".join(write(event) + "\n" for event in events)
        lines = send(auditgate, receiver, arguments, text)
        assert len(lines) == len(events), (len(lines), len(events))
        for event, line in zip(events, lines):
            messages, signature = cut(line)
            assert is_signed(keys, messages, signature), line
            damaged = [message.replace(b"87655c36", b"87655c37") for message in messages]
            assert damaged != messages and not is_signed(keys, damaged, signature), line
            fields = parse(line)
            assert fields.pop("sig") == signature, line
            wanted = expected(event, name)
            different = {key: (wanted.get(key), fields.get(key)) for key in wanted.keys() | fields.keys()}
            different = {key: pair for key, pair in different.items() if pair[0] != pair[1]}
            assert fields == wanted, (different, line)
        # Lines that have a signature are signed anew, and raw ones are passed on.
        text = b"".join(line + b"\n" for line in lines).decode()
        assert send(auditgate, receiver, arguments, text) == lines
        assert send(auditgate, receiver, ["--input-format", "raw"], text) == lines
        samples = send(auditgate, receiver, [*arguments, "--generate", str(GENERATED)], "")
        assert len(samples) == GENERATED, len(samples)
        for line in samples:
            messages, signature = cut(line)
            assert is_signed(keys, messages, signature) and parse(line)["sig"] == signature, line
        print(f"{name}: {len(lines)} events and {len(samples)} samples")


if __name__ == "__main__":
    main()
