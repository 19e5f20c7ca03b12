"""Every hop of a redirect is checked as the first URL was."""

from __future__ import annotations

import pytest

from molmo_core.errors import InvalidMedia
from molmo_server.media.public_url import parse
from molmo_server.settings import MolmoSettings
from tests.server.internet import PUBLIC, Internet, answer, redirect

GOOD = "http://pictures.example/cat.png"
LIMIT_BYTES = 1000


@pytest.fixture(autouse=True)
def cat(world: Internet) -> None:
    world.pages["pictures.example/cat.png"] = answer(b"a cat")


async def test_a_name_that_changes_between_hops(world: Internet) -> None:
    world.names["pictures.example"] = [[PUBLIC], ["127.0.0.1"]]
    world.pages["pictures.example/cat.png"] = redirect("/other.png")

    with pytest.raises(InvalidMedia, match="has no public address"):
        await world.media().fetch(GOOD, "image 1", LIMIT_BYTES)

    assert len(world.heads) == 1


BAD_HOPS = {
    "loopback": "http://127.0.0.1/",
    "loopback in IPv6": "http://[::1]/",
    "mapped": "http://[::ffff:127.0.0.1]/",
    "metadata": "http://169.254.169.254/latest/meta-data/",
    "inner name": "http://inner.example/",
    "localhost": "//localhost/",
    "decimal": "http://2130706433/",
    "user": "http://user:secret@pictures.example/",
    "port": "http://pictures.example:6379/",
    "port of the same": "//pictures.example:22/",
    "file": "file:///etc/passwd",
    "data": "data:image/png;base64,AAAA",
    "media": "media://media-00000000000000000000000000000000",
    "backslash": "http://pictures.example\\@127.0.0.1/",
    "backslashes": "\\\\127.0.0.1\\",
    "space": "http://127.0.0.1 .example/",
    "long": f"/{'a' * 3000}",
}


@pytest.mark.parametrize("n_hops", [1, 3])
@pytest.mark.parametrize("name", BAD_HOPS)
async def test_redirects_are_checked_as_the_first_url(
    world: Internet, name: str, n_hops: int
) -> None:
    world.names["inner.example"] = [["10.0.0.1"]]
    for hop in range(n_hops):
        location = f"http://pictures.example/{hop + 1}"
        world.pages[f"pictures.example/{hop}"] = redirect(location)
    world.pages[f"pictures.example/{n_hops - 1}"] = redirect(BAD_HOPS[name])

    with pytest.raises(InvalidMedia, match=r"^image 1") as caught:
        await world.media().fetch("http://pictures.example/0", "image 1", LIMIT_BYTES)

    assert "never to be read" not in caught.value.message
    assert len(world.heads) == n_hops
    assert world.connected == [[PUBLIC]] * n_hops


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirects_are_followed(world: Internet, status: int) -> None:
    world.pages["pictures.example/0"] = redirect("/1", status)
    world.pages["pictures.example/1"] = redirect("//other.example/2", status)
    world.pages["other.example/2"] = redirect("http://pictures.example/cat.png#part", status)

    url = "http://pictures.example/0#@127.0.0.1/"
    assert await world.media().fetch(url, "image 1", LIMIT_BYTES) == b"a cat"

    assert world.looked_up == ["pictures.example"] * 2 + ["other.example", "pictures.example"]
    with pytest.raises(InvalidMedia, match="redirected more than 2 times"):
        await world.media(remote_max_redirects=2).fetch(url, "image 1", LIMIT_BYTES)


async def test_a_redirect_to_itself_ends(world: Internet) -> None:
    for location in (GOOD, ""):
        world.pages["pictures.example/cat.png"] = redirect(location)
        with pytest.raises(InvalidMedia, match="redirected more than 3 times; send the last URL"):
            await world.media().fetch(GOOD, "image 1", LIMIT_BYTES)


async def test_a_redirect_from_https_stays_there() -> None:
    settings = MolmoSettings(remote_media="public")
    first = parse("https://pictures.example/a", "image 1", settings)

    assert str(parse("/b", "image 1", settings, base=first)) == "https://pictures.example/b"
    for text, base in ((GOOD, None), (GOOD, first)):
        with pytest.raises(InvalidMedia, match="'http' as URL scheme, allowed: https;"):
            parse(text, "image 1", settings, base=base)
