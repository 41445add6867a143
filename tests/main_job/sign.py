"""Signs audit events with Python's `cryptography`, which shares no code with the daemon.

    sign.py DIRECTORY

writes `jwks.json`, `sent.log` (lines that must all verify), `sent.gz` (the same, as a gzip body) and `kinds.log`
(one line of each kind, for the tests that damage every byte).
"""

import base64
import gzip
import json
import pathlib
import sys

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


def base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def signature(message: str) -> str:
    return base64url(KEY.sign(message.encode()))


def cef(line: str, padding: str = "") -> str:
    return f"{line} sig={signature(line)}{padding}"


def member(text: str, at: str) -> str:
    """A JSON object of at least one member, signed; the member `sig` is `first`, `middle` or `last`."""
    value = signature(text)
    if at == "first":
        return '{"sig":"' + value + '",' + text[1:]
    if at == "middle":
        # In front of the second member that is spelled `,"src":`.
        front, back = text.split(',"src":', 1)
        return front + ',"sig":"' + value + '","src":' + back
    if at == "spaced":
        return text[:-1] + ', "sig": "' + value + '"}'
    return text[:-1] + ',"sig":"' + value + '"}'


def cps_inner(text: str) -> str:
    """The inner object is what is signed."""
    return '{"event":' + member(text, "last") + "}"


def cps_whole(text: str, at: str) -> str:
    """The whole line without `sig` is what is signed."""
    value = '"sig":"' + signature('{"event":' + text + "}") + '"'
    if at == "inside":
        return '{"event":' + text[:-1] + "," + value + "}}"
    return '{"event":' + text + "," + value + "}"


HEAD = "2023-05-19T00:03:39Z konghq.com CEF:0|KongInc|Konnect|1.0|"
IDS = "org_id=b065b594-6afc-4658-9101-5d9cf3f36b7b principal_id=87655c36-8d63-48fe-9a1e-53b28dfbc19b"

CEF = [
    f"{HEAD}AUTHENTICATION_TYPE_PAT|AUTHENTICATION_OUTCOME_SUCCESS|0|rt=1684454619000 src=127.0.0.6 "
    f"request=/api/x success=true {IDS} trace_id=3895213347334635099 user_agent=curl/8",
    f"{HEAD}konnect|Authz.usage|1|rt=1684454619001 src=127.0.0.6 action=retrieve granted=true {IDS} actor_id= "
    "trace_id=8809518331550410226 user_agent=grpc-node/1.24.11 grpc-c/8.0.0 (linux; chttp2; ganges)",
    f"{HEAD}khcp|Ingress|1|rt=1684454619002 src=127.0.0.6 request=/v2/ü act=GET status=200 {IDS} "
    'trace_id=3895213347334635100 user_agent= query={"end":"1684270800","start":"1684098000"}',
    "Apr 14 05:39:08 konghq.com CEF:0|ExampleOrg|Konnect|1.0|kon\\|nect\\\\|Authz.portals|1|rt=1681450748406 "
    f"src=127.0.0.6 action=list granted=false {IDS} actor_id= trace_id=1 user_agent=a\\=b \\\\ \\n \\r",
    "2023-05-19T00:03:39Z konghq.com CEF:0|KongInc|Dev-Portal|1.0|AUTHENTICATION_OUTCOME_SUCCESS|0|"
    f"rt=1684454619003 src=127.0.0.6 request=/login success=true {IDS} portal_id=p trace_id=2 user_agent=x",
    f"{HEAD}konnect|Authz.odd|1|rt=3958q3097698 src=127.0.0.6 action=a granted=true {IDS} trace_id=3 user_agent=x",
    f"{HEAD}konnect|Authz.none|1|src=127.0.0.6 action=a granted=true {IDS} trace_id=4 user_agent=x",
    f"{HEAD}konnect|Authz.forged|1|rt=1684454619004 src=127.0.0.6 action=a granted=false {IDS} trace_id=5 "
    "user_agent=x granted=true name=Authz.other trace_id=1 sig=AAAA and more",
    f"{HEAD}konnect|Authz.world|1|rt=1684454619005 src=::1 action=a granted=true {IDS} trace_id=6 "
    "user_agent=Grüße 日本語 🦀 \t tab, a no-break space \u00a0 and \u2028",
]

JSON = [
    '{"action":"retrieve","actor_id":"","cef_version":0,"event_class_id":"konnect","event_product":"Konnect",'
    '"event_ts":"2023-05-19T00:03:39Z","event_vendor":"KongInc","event_version":"1.0","granted":true,'
    '"name":"Authz.usage","org_id":"b065b594","principal_id":"87655c36","rt":1684454620000,"severity":1,'
    '"src":"127.0.0.6","trace_id":18446744073709551616,"user_agent":"Grüße \\u00fc \\/ \\" \\\\ \\ud83e\\udd80"}',
    '{"name":"Ingress","query":"{\\"end\\":\\"1\\"}","rt":"1684454620001","src":"127.0.0.6","status":"200",'
    '"cef_version":"0","success":"true","trace_id":"7"}',
    '{"name":"Authz.new","src":"x","number":1e3,"tiny":-0.0,"huge":123456789012345678901234567890.50,'
    '"nested":{"a":[1,2,{"sig":"inner"}],"b":null},"schlüssel":"ö","kong_initiated":true,"trace_id":"8"}',
    '{"name":"Authz.lone","src":"x","user_agent":"\\ud800 \\u0000 \\u202e","trace_id":"9"}',
    '{ "name" : "Authz.spaced" , "rt":1684454620002 ,"src":"x", "trace_id":"10" }',
    '{"name":"Authz.twice","trace_id":"11","src":"x","trace_id":"12","tr\\u0061ce_id":"13"}',
]


def lines() -> list[str]:
    out = [cef(line) for line in CEF]
    out.append(cef(f"{HEAD}konnect|Authz.padded|1|rt=1684454619006 trace_id=14 user_agent=x", "=="))
    for number, text in enumerate(JSON):
        for at in ["first", "middle", "last", "spaced"]:
            # Another event each time: the same signed bytes would be the same event.
            if "Authz.spaced" in text and at in ("last", "spaced"):
                continue
            out.append(member(text.replace('"src":"', f'"src":"{at}{number}-', 1), at))
        if "Authz.spaced" in text:
            continue
        out.append(cps_inner(text.replace('"src":"', '"src":"inner-', 1)))
        out.append(cps_whole(text.replace('"src":"', '"src":"inside-', 1), "inside"))
        out.append(cps_whole(text.replace('"src":"', '"src":"outside-', 1), "outside"))
    for number in range(500):
        rt = 1684454700000 + number
        line = f"{HEAD}konnect|Authz.usage|1|rt={rt} src=127.0.0.6 action=a granted=true {IDS} trace_id={rt} user_agent=é"
        text = json.dumps({"name": "Ingress", "rt": rt, "src": "ö", "trace_id": str(rt)}, separators=(",", ":"))
        plain = json.dumps({"name": "Ingress", "rt": rt, "src": "ö", "x": number}, ensure_ascii=False, separators=(",", ":"))
        out.append([cef(line), member(text, "last"), cps_inner(plain)][number % 3])
    return out


def kinds() -> list[str]:
    short = '{"name":"Authz.ü","rt":1684454620003,"src":"127.0.0.6","trace_id":18446744073709551616}'
    numbered = [short.replace("Authz.ü", f"Authz.ü{number}") for number in range(6)]
    return [
        cef(CEF[0]),
        cef(CEF[7]),
        member(numbered[0], "first"),
        member(numbered[1], "middle"),
        member(numbered[2], "last"),
        cps_inner(numbered[3]),
        cps_whole(numbered[4], "inside"),
        cps_whole(numbered[5], "outside"),
    ]


def main() -> None:
    directory = pathlib.Path(sys.argv[1])
    public = KEY.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    key = {"alg": "EdDSA", "crv": "Ed25519", "kid": "python", "kty": "OKP", "x": base64url(public)}
    (directory / "jwks.json").write_text(json.dumps({"keys": [key]}))
    sent = "".join(line + "\n" for line in lines()).encode()
    (directory / "sent.log").write_bytes(sent)
    (directory / "sent.gz").write_bytes(gzip.compress(sent))
    (directory / "kinds.log").write_bytes("".join(line + "\n" for line in kinds()).encode())


if __name__ == "__main__":
    main()
