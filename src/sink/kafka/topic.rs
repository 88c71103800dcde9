//! Records handed to librdkafka by their topic's handle. By the topic's name each of them would take the lock of the whole client
//! for writing, which its own threads want too, and have the name copied.

use std::ffi::CString;
use std::ptr::{self, NonNull};

use rdkafka::bindings::{self as native, rd_kafka_vtype_t as Field};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::producer::{BaseProducer, Producer};

use super::reports::Reports;

/// `RD_KAFKA_PARTITION_UA`
const BY_KEY: i32 = -1;

/// The handles of a producer's topics, by their places in the list of names.
pub(super) struct Topics<'a> {
    producer: &'a BaseProducer<Reports>,
    handles: Vec<Option<Topic<'a>>>,
}

/// A topic of a producer that is still there.
pub(super) struct Topic<'a> {
    producer: &'a BaseProducer<Reports>,
    handle: NonNull<native::rd_kafka_topic_t>,
}

impl<'a> Topics<'a> {
    pub(super) fn new(producer: &'a BaseProducer<Reports>) -> Self {
        Self { producer, handles: Vec::new() }
    }

    /// The topic at a place, whose name stays the same.
    pub(super) fn at(&mut self, place: usize, name: &str) -> Result<&Topic<'a>, KafkaError> {
        if self.handles.len() <= place {
            self.handles.resize_with(place + 1, || None);
        }
        match &mut self.handles[place] {
            Some(topic) => Ok(topic),
            none => Ok(none.insert(Topic::new(self.producer, name)?)),
        }
    }
}

impl<'a> Topic<'a> {
    fn new(producer: &'a BaseProducer<Reports>, name: &str) -> Result<Self, KafkaError> {
        let name = CString::new(name)?;
        // SAFETY: the client lives as long as `producer` does; without a configuration the topic gets the client's own.
        let handle =
            unsafe { native::rd_kafka_topic_new(producer.client().native_ptr(), name.as_ptr(), ptr::null_mut()) };
        // It is refused for a name alone.
        let refused = KafkaError::MessageProduction(RDKafkaErrorCode::InvalidTopic);
        Ok(Self { producer, handle: NonNull::new(handle).ok_or(refused)? })
    }

    /// Queues a record, of which librdkafka takes a copy. Without a timestamp (ms since 1970) it has that of now, without a
    /// partition that of its key.
    ///
    /// # Errors
    /// As [`BaseProducer::send`]: [`RDKafkaErrorCode::QueueFull`] among them.
    pub(super) fn send(
        &self,
        key: Option<&[u8]>,
        value: Option<&[u8]>,
        timestamp: Option<i64>,
        partition: Option<i32>,
    ) -> Result<(), KafkaError> {
        let pointer = |bytes: Option<&[u8]>| bytes.map_or(ptr::null(), <[u8]>::as_ptr);
        let length = |bytes: Option<&[u8]>| bytes.map_or(0, <[u8]>::len);
        // SAFETY: client and topic live as long as `self`. Each field is followed by what rdkafka.h wants of it, and RD_KAFKA_MSG_F_COPY
        // has key and value copied before the call returns.
        let code = unsafe {
            native::rd_kafka_producev(
                self.producer.client().native_ptr(),
                Field::RD_KAFKA_VTYPE_RKT,
                self.handle.as_ptr(),
                Field::RD_KAFKA_VTYPE_PARTITION,
                partition.unwrap_or(BY_KEY),
                Field::RD_KAFKA_VTYPE_MSGFLAGS,
                native::RD_KAFKA_MSG_F_COPY,
                Field::RD_KAFKA_VTYPE_VALUE,
                pointer(value),
                length(value),
                Field::RD_KAFKA_VTYPE_KEY,
                pointer(key),
                length(key),
                Field::RD_KAFKA_VTYPE_TIMESTAMP,
                timestamp.unwrap_or(0),
                Field::RD_KAFKA_VTYPE_END,
            )
        };
        match RDKafkaErrorCode::from(code) {
            RDKafkaErrorCode::NoError => Ok(()),
            code => Err(KafkaError::MessageProduction(code)),
        }
    }
}

impl Drop for Topic<'_> {
    fn drop(&mut self) {
        // SAFETY: it was made by `new`, and nobody has it any more.
        unsafe { native::rd_kafka_topic_destroy(self.handle.as_ptr()) };
    }
}
