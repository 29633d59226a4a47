"""Data sets of pictures with captions: read, checked, deduplicated, screened and prepared.

The way of a set, and the whole of what a trainer needs::

    with open_source("pictures/") as source:      # folder, zip, tar, WebDataset, s3://
        prepared = prepare(source, Options(resolution=1024), screen=moderator)
        prepared.report.raise_for_errors()  # DatasetRefused: code, message, file, field
        prepared.report.digest              # sha256 of all that will be learnt
        for sample in prepared.samples("train"):  # "train", "held out" or "all"
            sample.image      # uint8 [3, height, width], RGB, cropped to sample.bucket
            sample.caption    # final: trigger, prefix and suffix are in it
            sample.bucket     # (width, height) in pixels, multiples of 16
            sample.sha256     # of the file as it was given: what `calotype rights revoke` names
            sample.rights     # config.rights.Rights, the picture's own or the set's

`prepared.samples()` reads each file again and holds one picture at a time; a file that is not what
was checked raises DatasetRefused ``dataset_changed``. `prepared[index]` reads one sample; indices
count the used pictures in the order of `report.used`, which is that of their file names.

No torch here: a gateway checks uploads with this code.
"""
