"""Server-side request forgery: what may be fetched, URL by URL and address by address."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from molmo_core.errors import InvalidMedia
from molmo_server.media.public_url import is_public, parse
from molmo_server.media.remote import RemoteMedia, system_look_up
from molmo_server.settings import MolmoSettings
from tests.server.internet import PUBLIC, Internet, answer
from tests.support.gateway import RunningGateway, assert_refused, running_gateway

GOOD = "http://pictures.example/cat.png"
LIMIT_BYTES = 1000


@pytest.fixture(autouse=True)
def cat(world: Internet) -> None:
    world.pages["pictures.example/cat.png"] = answer(b"a cat")


BAD_URLS = {
    # Hosts that are no public name, in every spelling.
    "localhost": "http://localhost/",
    "upper case": "http://LOCALHOST/",
    "one label": "http://intranet/cat.png",
    "trailing dot": "http://pictures.example./cat.png",
    "localhost with a dot": "http://localhost./",
    "circled localhost": "http://ⓛⓞⓒⓐⓛⓗⓞⓢⓣ/",
    "wide localhost": "http://ｌｏｃａｌｈｏｓｔ/",
    "bold localhost": "http://𝐥𝐨𝐜𝐚𝐥𝐡𝐨𝐬𝐭/",
    "cyrillic localhost": "http://lоcalhost/",
    "greek localhost": "http://lοcalhost/",
    "long s": "http://localhoſt/",
    "soft hyphen": "http://local\u00adhost/",
    "zero width": "http://local\u200bhost.example/",
    "right to left": "http://\u202eexample.org/",
    "account of": "http://ex\u2100mple.org/",
    "empty host": "http:///cat.png",
    "no host": "http://",
    "no slashes": "http:pictures.example/cat.png",
    "empty label": "http://pictures..example/",
    "dot alone": "http://./",
    "percent in host": "http://%6cocalhost/",
    "percent nul": "http://pictures%00.example/",
    "percent at": "http://pictures.example%40127.0.0.1/",
    "percent slash": "http://pictures.example%2f@127.0.0.1/",
    "comma": "http://pictures,example/",
    "long label": f"http://{'a' * 64}.example/",
    "long name": f"http://{'a.' * 130}example/",
    "long URL": f"http://pictures.example/{'a' * 3000}",
    # Numbers that some resolvers read as 127.0.0.1 or another address.
    "decimal": "http://2130706433/",
    "octal": "http://0177.0.0.1/",
    "octal whole": "http://017700000001/",
    "hexadecimal": "http://0x7f.0x0.0x0.0x1/",
    "hexadecimal whole": "http://0x7f000001/",
    "hexadecimal last": "http://127.0.0.0x1/",
    "hexadecimal empty": "http://127.0.0.0x/",
    "short": "http://127.1/",
    "three parts": "http://127.0.1/",
    "leading zeros": "http://127.000.000.001/",
    "five parts": "http://1.2.3.4.5/",
    "too large": "http://256.256.256.256/",
    "large decimal": "http://4294967296/",
    "number at the end": "http://pictures.example.1/",
    "address with a dot": "http://93.184.216.34./",
    # Who is asked, written so that two readers may differ.
    "user": "http://user@pictures.example/",
    "password": "http://user:secret@pictures.example/",
    "name as user": "http://pictures.example@127.0.0.1/",
    "name and port as user": "http://pictures.example:80@127.0.0.1/",
    "backslash at": "http://pictures.example\\@127.0.0.1/",
    "backslash": "http://pictures.example\\127.0.0.1/",
    "backslashes": "http:\\\\pictures.example/",
    "semicolon": "http://pictures.example;@127.0.0.1/",
    "two users": "http://a@b@127.0.0.1/",
    "brackets": "http://[127.0.0.1]/",
    "half a bracket": "http://[::1/",
    "behind a bracket": "http://[::1]pictures.example/",
    # Ports and schemes.
    "port 22": "http://pictures.example:22/",
    "port 8080": "http://pictures.example:8080/",
    "port 0": "http://pictures.example:0/",
    "port 65536": "http://pictures.example:65536/",
    "two ports": "http://pictures.example:80:22/",
    "redis": "http://pictures.example:6379/",
    "ftp": "ftp://pictures.example/cat.png",
    "file": "file:///etc/passwd",
    "gopher": "gopher://pictures.example:80/_x",
    "dict": "dict://pictures.example:80/x",
    "unix": "http+unix://%2ftmp%2fengine.sock/v1",
    "jar": "jar:http://pictures.example/!/",
    "javascript": "javascript:alert(1)",
    "network path": "//pictures.example/cat.png",
    "path": "/etc/passwd",
    # Characters that end a line or a word somewhere.
    "line feed": "http://pictures.example/\r\nHost: 127.0.0.1",
    "line feed in host": "http://pictures.example\n.evil.example/",
    "return": "http://pictures.example/\rX: y",
    "tab": "http://pictures\t.example/",
    "space": "http://pictures.example /",
    "leading space": " http://pictures.example/",
    "no-break space": "http://pictures\u00a0.example/",
    "nul": "http://pictures.example/\0",
    "line separator": "http://pictures.example/\u2028x",
    "next line": "http://pictures.example/\u0085x",
}


@pytest.mark.parametrize("name", BAD_URLS)
async def test_urls_that_are_refused_before_anything_is_looked_up(
    world: Internet, name: str
) -> None:
    with pytest.raises(InvalidMedia, match=r"^image 1 has"):
        await world.media().fetch(BAD_URLS[name], "image 1", LIMIT_BYTES)

    assert (world.looked_up, world.connected, world.heads) == ([], [], [])


INNER = [
    *("127.0.0.1", "127.255.255.254", "0.0.0.0", "0.1.2.3", "10.0.0.1", "172.16.0.1"),
    *("172.31.255.254", "192.168.1.1", "169.254.169.254", "100.64.0.1", "100.100.100.200"),
    *("192.0.0.1", "192.0.0.192", "192.0.2.1", "192.88.99.1", "198.18.0.1", "198.51.100.1"),
    *("203.0.113.1", "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255"),
    *("168.63.129.16", "::", "::1", "::7f00:1", "::ffff:127.0.0.1", "::ffff:10.0.0.1"),
    *("::ffff:169.254.169.254", "::ffff:0:127.0.0.1", "64:ff9b::127.0.0.1", "64:ff9b::a9fe:a9fe"),
    *("64:ff9b:1::808:808", "100::1", "2001::1", "2001:db8::1"),
    # 6to4 and Teredo around 127.0.0.1 and 10.0.0.1 (Teredo's caller is inverted).
    *("2002:7f00:1::", "2002:a00:1::1", "2001:0:808:808::80ff:fffe", "2001:0:7f00:1::f7f7:f7f7"),
    *("2606:4700::5efe:127.0.0.1", "2606:4700::200:5efe:10.0.0.1", "3fff::1", "5f00::1"),
    *("fc00::1", "fd00:ec2::254", "fe80::1", "fe80::1%1", "fec0::1", "ff02::1", "4000::1"),
]
OUTER = [
    *(PUBLIC, "8.8.8.8", "1.1.1.1", "172.32.0.1", "100.128.0.1", "2606:4700:4700::1111"),
    *("2001:4860:4860::8888", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::1"),
]
"""Public, written plainly or inside another address."""

OUTER.append("2001:0:808:808::f7f7:f7f7")  # Teredo: 8.8.8.8 on both sides


@pytest.mark.parametrize("address", INNER)
async def test_names_of_addresses_that_are_not_public(world: Internet, address: str) -> None:
    world.names["pictures.example"] = [[address]]
    world.names["half.example"] = [[PUBLIC, address]]

    for url in (GOOD, "http://half.example/cat.png"):
        with pytest.raises(InvalidMedia, match="has no public address; upload") as caught:
            await world.media().fetch(url, "image 1", LIMIT_BYTES)
        assert address not in caught.value.message
    assert (world.connected, world.heads) == ([], [])


@pytest.mark.parametrize("address", INNER)
async def test_addresses_that_are_not_public_written_as_such(world: Internet, address: str) -> None:
    host = f"[{address}]" if ":" in address else address

    with pytest.raises(InvalidMedia, match="has no public address"):
        await world.media().fetch(f"http://{host}/", "image 1", LIMIT_BYTES)

    assert (world.looked_up, world.connected, world.heads) == ([], [], [])


@pytest.mark.parametrize(
    "url",
    [
        "http://①②⑦.⓪.⓪.①/",
        "http://１２７.０.０.１/",
        "http://127。0。0。1/",
        "http://[fe80::1%25eth0]/",
        "http://[2606:4700::1111%eth0]/",
    ],
)
async def test_addresses_that_hosts_turn_out_to_be(world: Internet, url: str) -> None:
    with pytest.raises(InvalidMedia, match="has no public address"):
        await world.media().fetch(url, "image 1", LIMIT_BYTES)

    assert (world.looked_up, world.connected, world.heads) == ([], [], [])


async def test_digits_of_other_scripts_are_letters_to_a_resolver(world: Internet) -> None:
    with pytest.raises(InvalidMedia, match="answered with status 404"):
        await world.media().fetch("http://١٢٧.٠.٠.١/", "image 1", LIMIT_BYTES)

    [name] = world.looked_up
    assert name.startswith("xn--")
    assert name.isascii()


@pytest.mark.parametrize("address", OUTER)
async def test_public_addresses(world: Internet, address: str) -> None:
    world.names["pictures.example"] = [[address]]

    assert await world.media().fetch(GOOD, "image 1", LIMIT_BYTES) == b"a cat"

    assert world.connected == [[address]]
    assert is_public(ip_address(address))


async def test_a_name_that_is_not_there(world: Internet) -> None:
    """Told in the words for an inner address: which inner names exist is nobody's business."""
    world.names["pictures.example"] = [[]]

    with pytest.raises(InvalidMedia, match="example' has no public address; upload"):
        await world.media().fetch(GOOD, "image 1", LIMIT_BYTES)


async def test_a_name_with_two_answers_is_asked_once(world: Internet) -> None:
    world.names["pictures.example"] = [[PUBLIC], ["127.0.0.1"]]

    assert await world.media().fetch(GOOD, "image 1", LIMIT_BYTES) == b"a cat"

    assert world.looked_up == ["pictures.example"]
    assert world.connected == [[PUBLIC]]


@pytest.mark.parametrize(
    ("host", "is_taken"),
    [
        ("pictures.example", True),
        ("PICTURES.EXAMPLE", True),
        ("a.cdn.example", True),
        ("b.a.cdn.example", True),
        ("bücher.example", True),
        ("xn--bcher-kva.example", True),
        ("93.184.216.34", True),
        ("93.184.216.35", False),
        ("cdn.example", False),
        ("evilcdn.example", False),
        ("a.pictures.example", False),
        ("pictures.example.evil.example", False),
        ("pictures-example.evil", False),
        ("bucher.example", False),
    ],
)
def test_hosts_of_the_list(host: str, is_taken: bool) -> None:
    settings = MolmoSettings(
        remote_media="allowlist",
        remote_hosts="pictures.example, *.cdn.example,xn--bcher-kva.example,93.184.216.34",
    )

    if is_taken:
        assert parse(f"https://{host}/", "image 1", settings).scheme == "https"
    else:
        with pytest.raises(InvalidMedia, match="which this server does not fetch"):
            parse(f"https://{host}/", "image 1", settings)


async def test_a_listed_host_has_to_be_public_too(world: Internet) -> None:
    world.names["pictures.example"] = [["192.168.1.1"]]
    media = world.media(remote_media="allowlist", remote_hosts=("pictures.example",))

    with pytest.raises(InvalidMedia, match="has no public address"):
        await media.fetch(GOOD, "image 1", LIMIT_BYTES)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"remote_media": "allowlist"}, "set remote_media to allowlist and name hosts"),
        ({"remote_hosts": ("a.example",)}, "remote_media is off and remote_hosts names 1 hosts"),
        *(
            ({"remote_media": "allowlist", "remote_hosts": (host,)}, "name hosts as example.org")
            for host in ("https://a.example", "a.example:443", "*", "*example.org", "a.*.example")
        ),
    ],
)
def test_lists_that_cannot_be_meant(settings: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        MolmoSettings(**settings)


async def test_without_the_loopback_of_tests_loopback_is_refused(world: Internet) -> None:
    """The same server, the way the service fetches: neither its name nor its address will do."""

    async def loopback(host: str, port: int) -> list[str]:
        return await system_look_up("localhost", port)

    settings = MolmoSettings(remote_media="public", remote_allow_http=True)
    for url in (GOOD, "http://127.0.0.1/cat.png", f"http://127.0.0.1:{world.port}/cat.png"):
        with pytest.raises(InvalidMedia, match=r"no public address|allowed are 80 and 443"):
            await RemoteMedia(settings, look_up=loopback).fetch(url, "image 1", LIMIT_BYTES)
    assert world.heads == []


@pytest.fixture(scope="module")
def open_gateway(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningGateway]:
    allowed: dict[str, Any] = {"remote_media": "public", "remote_allow_http": True}
    with running_gateway(folder, tmp_path_factory.mktemp("sockets"), **allowed) as gateway:
        yield gateway


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("http://127.0.0.1/cat.png", "image 1: '127.0.0.1' has no public address"),
        ("http://[::1]/cat.png", "image 1: '::1' has no public address"),
        ("http://localhost/cat.png", "image 1 has a URL whose host 'localhost' is no public name"),
        ("http://169.254.169.254/latest", "has no public address"),
        ("file:///etc/passwd", "image 1 has 'file' as URL scheme, only data URLs, uploads"),
    ],
)
def test_what_callers_are_told(open_gateway: RunningGateway, url: str, says: str) -> None:
    response = open_gateway.http.post("/v1/point", json={"image_url": url, "object": "x"})

    assert assert_refused(open_gateway, response, says)["code"] == "invalid_media"
