# 24 kinds of dogs, cats, insects and apes, from Tiny ImageNet (research use only).
_base_ = './images_64.py'

data_root = '{{$GPLQ_DATA_ROOT:data/animals24}}'
train_dataloader = dict(dataset=dict(data_root=data_root))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = dict(dataset=dict(data_root=data_root))
