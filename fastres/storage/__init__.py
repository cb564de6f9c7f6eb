"""Objects in stores such as Amazon S3 and Google Cloud Storage, by URL: listed, read in ranges, written, deleted.

``urls`` takes URLs apart and hides secrets in messages. ``filesystems`` opens one fsspec file system per process and
protocol; nothing outside this folder uses fsspec. ``failures`` repeats what failed for a moment, and turns the errors
of all packages into a ``StorageError``. ``pages`` lists objects in the order of a walk through folders. ``inputs`` is
an object as a file. ``objects`` has the functions that others use.
"""
