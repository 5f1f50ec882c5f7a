"""A campaign of faults: `make faults` does to the project what disks, clusters and strangers do.

Each campaign makes trials from a seed, and a trial survives or fails. What surviving means is strict:

- kill: a run is killed at some moment, in half of the trials while it saves. The same command then ends
  with exit code 0, with the losses and the projector of a run that nobody killed, to the bit. No
  scratch file and no state is left.
- signals: a run that is asked to stop ends with 128 + the signal's number, and "error:" in its output
  but no traceback. If the signal came during the steps, the last step is saved. The same command then
  ends to the same bits.
- together: a second command in the folder of a run ends with exit code 2 and names the process that
  holds it, also with fresh=true. The first one ends to the same bits.
- disk: the disk is full, or a file may grow no further, from some step on. The command ends with exit
  code 2, "error:" and no traceback. With space again, the same command ends to the same bits.
- corrupt: one file of a run's folder is damaged. Commands end with 0, or with 2 and "error:", and
  never with a traceback. If `make tune` resumes a stopped run and ends with 0, then to the same bits.
- examples: one row or picture of a data set is damaged. It is used or listed, all others are used, and
  no label holds a replacement character; or the whole data set is refused with a message.
- servers: a server misbehaves. The file is there whole, or it is not there at all and an error says so,
  within a minute.
- strangers: a folder from somebody else holds code. It does not run, and commands end with 0 or 2.
- special: a pipe, a device or a folder is where a file should be. Commands end, with 0 or 2.

In every campaign a command that takes too long has failed.
"""
