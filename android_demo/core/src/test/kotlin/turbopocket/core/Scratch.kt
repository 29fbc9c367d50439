// SPDX-License-Identifier: Apache-2.0
package turbopocket.core

import kotlinx.serialization.json.Json
import kotlinx.serialization.json.JsonArray
import kotlinx.serialization.json.JsonElement
import kotlinx.serialization.json.JsonObject
import kotlinx.serialization.json.JsonPrimitive
import kotlinx.serialization.json.jsonArray
import kotlinx.serialization.json.jsonObject
import kotlinx.serialization.json.jsonPrimitive
import org.junit.jupiter.api.Assertions.assertThrows
import org.junit.jupiter.api.Assertions.assertTrue
import turbopocket.core.artifact.MANIFEST_NAME
import turbopocket.core.artifact.sha256
import java.io.File

/** A copy of the golden artifact in [folder], to damage. */
class Scratch(val folder: File) {
    init {
        File(Golden.all.artifact).copyRecursively(folder, overwrite = true)
    }

    private val manifest get() = File(folder, MANIFEST_NAME)

    fun json(): JsonObject = Json.parseToJsonElement(manifest.readText()).jsonObject

    fun write(json: JsonElement) = manifest.writeText(json.toString())

    /** The manifest with one key of its first level changed; null removes it. */
    fun set(key: String, value: JsonElement?) =
        write(JsonObject(json() - key + listOfNotNull(value?.let { key to it })))

    /** The manifest with the entry of [path] in `files` changed. */
    fun setFile(path: String, vararg values: Pair<String, JsonElement>) = set(
        "files",
        JsonArray(
            json().getValue("files").jsonArray.map {
                if (it.jsonObject["path"]?.jsonPrimitive?.content == path) JsonObject(it.jsonObject + values) else it
            },
        ),
    )

    /** A new file of the artifact, listed. */
    fun add(path: String, content: ByteArray) {
        val file = File(folder, path).apply { writeBytes(content) }
        val entry = JsonObject(
            mapOf(
                "path" to JsonPrimitive(path),
                "bytes" to JsonPrimitive(content.size),
                "sha256" to JsonPrimitive(sha256(file)),
            ),
        )
        set("files", JsonArray(json().getValue("files").jsonArray + entry))
    }
}

/** That [block] refuses with a sentence that holds [words]. */
fun assertRefused(words: String, block: () -> Unit) {
    val message = assertThrows(Refused::class.java) { block() }.message.orEmpty()
    assertTrue(words in message, "'$message' does not say '$words'")
    assertTrue('\n' !in message, "more than a line: $message")
}
