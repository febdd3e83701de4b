"""Cookies of a mesh's own clients: an answer is searched for them only where it sets one.

httpx asks the standard library's cookie jar about every answer, and builds a `urllib` request and response for that:
10 us, as much as all that a mesh does with a call. Decides nothing about a cookie; the same jar does.
"""

from __future__ import annotations

from http.cookiejar import CookieJar

import httpx

SETTING = b"set-cookie"
"""How the names of the headers begin that set one; there is a `Set-Cookie2` as well."""


class SparingCookies(httpx.Cookies):
    """The jar of a client, which is not asked about answers that have nothing for it."""

    def extract_cookies(self, response: httpx.Response) -> None:
        """Take the cookies that the answer sets, if it does."""
        for name, _ in response.headers.raw:
            if name.lower().startswith(SETTING):
                super().extract_cookies(response)
                return


def spare(client: httpx.Client | httpx.AsyncClient) -> None:
    """Let a client ask its jar sparingly; one of the user's own making may want to see every answer.

    httpx has no public way to give a client such an object: what is set in public is copied. So if a release keeps its
    cookies elsewhere, they are left alone.
    """
    cookies = client.cookies
    if type(cookies) is httpx.Cookies and type(cookies.jar) is CookieJar and vars(client).get("_cookies") is cookies:
        client._cookies = SparingCookies(cookies.jar)
