"""From what a request names (data URL, upload, remote URL) to checked media.

gate        every way in, and what a prompt gets
look        what a picture or video is and measures, remembered by digest
pictures    whether a picture can be decoded, and what it measures
probe       the child process that looks at one video or large picture
spool       uploaded files: content-addressed, with a time to live and a quota
remote      files of other servers, fetched from addresses that were checked
public_url  which URLs and addresses those may be

The child imports this package before it limits itself: nothing is imported here.
"""
