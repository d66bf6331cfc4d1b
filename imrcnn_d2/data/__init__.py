"""Data sets, from files to batches.

catalog: names and records; loader, mapper, augmentation: training batches; images, masks: files;
endoscope_view, distortions: image processing. Packages: formats (annotation formats and public data
sets), prepare (data sets for training), audit (what is wrong with a data set).
"""
