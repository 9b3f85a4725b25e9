# Swin-S (50 M parameters), with the weights that timm has of it.
model = dict(
    type='gplq.plugins.fgvc.TimmClassifier',
    model_name='swin_small_patch4_window7_224.ms_in1k',
    pretrained=True,
)
