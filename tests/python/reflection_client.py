"""Lists and calls the gRPC API through server reflection alone: no generated code. Prints one JSON document."""

import json
import sys

import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

target, request = sys.argv[1], json.loads(sys.argv[2])
with grpc.insecure_channel(target) as channel:
    database = ProtoReflectionDescriptorDatabase(channel)
    pool = DescriptorPool(database)
    services = sorted(database.get_services())
    service = pool.FindServiceByName("perigee.v1.Inference")
    method = service.FindMethodByName("Generate")
    call = channel.unary_stream(
        f"/{service.full_name}/{method.name}",
        request_serializer=GetMessageClass(method.input_type).SerializeToString,
        response_deserializer=GetMessageClass(method.output_type).FromString,
    )
    message = ParseDict(request, GetMessageClass(method.input_type)())
    events = [MessageToDict(event, preserving_proto_field_name=True) for event in call(message, timeout=120)]
    print(json.dumps({"services": services, "methods": [m.name for m in service.methods], "events": events}))
