// SPDX-License-Identifier: Apache-2.0
package turbopocket.app

import android.content.ContentResolver
import android.net.Uri
import android.provider.DocumentsContract
import turbopocket.core.Refused
import turbopocket.core.artifact.Artifact
import turbopocket.core.drawing.megabytes
import java.io.File
import java.io.IOException

/** The artifacts that this app holds, each in a folder of its own. */
class Models(private val root: File) {
    /** Folders of artifacts, half downloaded ones included, by name. */
    fun folders(): List<File> = root.listFiles()?.filter { it.isDirectory }?.sortedBy { it.name }.orEmpty()

    /** One line for the list: name, bytes, parity; or why it is not opened. */
    fun line(folder: File): String = try {
        Artifact.open(folder).run { "${manifest.name}: ${megabytes(totalBytes)}, compared with PyTorch: passed" }
    } catch (error: Refused) {
        "${folder.name}: ${error.message}"
    }

    /** Where an artifact of that name lies or shall lie. */
    fun folder(name: String): File = File(root, name.filter { it.isLetterOrDigit() || it in "-_" }.ifEmpty { "model" })

    /** A copy of the folder that a user picked; [Artifact.open] decides whether it is one. */
    fun import(resolver: ContentResolver, tree: Uri): File {
        val id = DocumentsContract.getTreeDocumentId(tree)
        val target = folder(id.substringAfterLast('/').substringAfterLast(':'))
        target.deleteRecursively()
        copy(resolver, tree, id, target)
        return target
    }

    private fun copy(resolver: ContentResolver, tree: Uri, id: String, target: File) {
        target.mkdirs()
        val children = DocumentsContract.buildChildDocumentsUriUsingTree(tree, id)
        val columns = arrayOf(
            DocumentsContract.Document.COLUMN_DOCUMENT_ID,
            DocumentsContract.Document.COLUMN_DISPLAY_NAME,
            DocumentsContract.Document.COLUMN_MIME_TYPE,
        )
        resolver.query(children, columns, null, null, null)?.use { rows ->
            while (rows.moveToNext()) {
                val to = File(target, File(rows.getString(1)).name)
                if (rows.getString(2) == DocumentsContract.Document.MIME_TYPE_DIR) {
                    copy(resolver, tree, rows.getString(0), to)
                } else {
                    val from = DocumentsContract.buildDocumentUriUsingTree(tree, rows.getString(0))
                    val stream = resolver.openInputStream(from) ?: throw IOException("$from can not be read")
                    stream.use { input -> to.outputStream().use { input.copyTo(it) } }
                }
            }
        }
    }
}
