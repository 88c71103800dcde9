//! The id of a topic: another one under the same name means that the topic was deleted and made anew.
//!
//! The safe client does not offer DescribeTopics, so this file speaks to librdkafka itself.

use std::ffi::{CStr, CString};
use std::ptr;
use std::time::Duration;

use rdkafka::bindings as rd;
use rdkafka::client::{Client, ClientContext};
use rdkafka::error::KafkaError;
use rdkafka::types::RDKafkaErrorCode;

/// The id in base64, as `kafka-topics.sh --describe` prints it. Blocking.
///
/// # Errors
/// [`KafkaError::MetadataFetch`] with what the broker or librdkafka says.
pub fn topic_id<C: ClientContext>(client: &Client<C>, topic: &str, timeout: Duration) -> Result<String, KafkaError> {
    let name = CString::new(topic).map_err(KafkaError::Nul)?;
    let milliseconds = i32::try_from(timeout.as_millis()).unwrap_or(i32::MAX);
    let mut names = [name.as_ptr()];
    // SAFETY: the client outlives the call. The collection copies the name; collection, options and queue are made
    // here, used by this thread only, and destroyed once each; a request still under way keeps its own references.
    unsafe {
        let rk = client.native_ptr();
        let topics = rd::rd_kafka_TopicCollection_of_topic_names(names.as_mut_ptr(), names.len());
        let options = rd::rd_kafka_AdminOptions_new(rk, rd::rd_kafka_admin_op_t::RD_KAFKA_ADMIN_OP_DESCRIBETOPICS);
        rd::rd_kafka_AdminOptions_set_request_timeout(options, milliseconds, ptr::null_mut(), 0);
        let queue = rd::rd_kafka_queue_new(rk);
        rd::rd_kafka_DescribeTopics(rk, topics, options, queue);
        let event = rd::rd_kafka_queue_poll(queue, milliseconds);
        let id = read_id(event);
        if !event.is_null() {
            rd::rd_kafka_event_destroy(event);
        }
        rd::rd_kafka_queue_destroy(queue);
        rd::rd_kafka_AdminOptions_destroy(options);
        rd::rd_kafka_TopicCollection_destroy(topics);
        id
    }
}

/// # Safety
/// `event` is null or a live event of a queue that only DescribeTopics answers to.
unsafe fn read_id(event: *mut rd::rd_kafka_event_t) -> Result<String, KafkaError> {
    let failed = |code: RDKafkaErrorCode| Err(KafkaError::MetadataFetch(code));
    if event.is_null() {
        return failed(RDKafkaErrorCode::OperationTimedOut);
    }
    // SAFETY: the caller's promise; every pointer below points into the event and is used while that lives.
    unsafe {
        let error = rd::rd_kafka_event_error(event);
        if error != rd::rd_kafka_resp_err_t::RD_KAFKA_RESP_ERR_NO_ERROR {
            return failed(error.into());
        }
        let result = rd::rd_kafka_event_DescribeTopics_result(event);
        if result.is_null() {
            return failed(RDKafkaErrorCode::Unknown);
        }
        let mut count = 0;
        let topics = rd::rd_kafka_DescribeTopics_result_topics(result, &raw mut count);
        if count != 1 {
            return failed(RDKafkaErrorCode::UnknownTopic);
        }
        let topic = *topics;
        let error = rd::rd_kafka_TopicDescription_error(topic);
        if !error.is_null() && rd::rd_kafka_error_code(error) != rd::rd_kafka_resp_err_t::RD_KAFKA_RESP_ERR_NO_ERROR {
            return failed(rd::rd_kafka_error_code(error).into());
        }
        let text = rd::rd_kafka_Uuid_base64str(rd::rd_kafka_TopicDescription_topic_id(topic));
        if text.is_null() {
            return failed(RDKafkaErrorCode::Unknown);
        }
        Ok(CStr::from_ptr(text).to_string_lossy().into_owned())
    }
}
