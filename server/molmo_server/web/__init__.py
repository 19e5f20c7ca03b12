"""The web server beside the application: what it is called with, how long it waits, what its
answers say to browsers.

server       uvicorn's configuration, the same for `molmo serve` and tests
connections  time limits of a connection, and how many there may be
plain        routes that FastAPI describes and has nothing else to do with
headers      what every answer tells a browser; who may ask from other pages
docs_page    the OpenAPI document as a page
"""
